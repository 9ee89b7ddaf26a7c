//! How a client's calls reach the device: as calls of the library, or as messages of a vfio-user client to the function around it,
//! registers and memory as `docs/accel-abi.md` has them. Both run on virtual time.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use wherry_accel::abi::{Descriptor, Fence, command, register, slot_register};
use wherry_accel::catalogue::{Catalogue, EngineId, Host};
use wherry_accel::clock::{Clock, VirtualClock};
use wherry_accel::device::{Caller, Device, FIRST_SPACE, Param};
use wherry_accel::drive::{Bells, Drive, Driven};
use wherry_accel::error::{Errno, Refused};
use wherry_accel::function::{AccelFunction, Model};
use wherry_accel::memory::{Access, AddressSpace, Atomic, Fault, Width};
use wherry_accel::{FenceState, Tunables};
use wherry_vfio_user::client::NoMemory;
use wherry_vfio_user::payload::pci_region;
use wherry_vfio_user::{Client, Options, Server, State, Stop, server};

use super::client::{COUNTS, END, READ_ONLY};

type Result<T> = std::result::Result<T, Refused>;

/// What a client can ask of a device.
pub trait Calls {
    fn create(&self, caller: Caller, flags: u32, extensions: u64) -> Result<u32>;
    fn destroy(&self, context: u32) -> Result<()>;
    fn set(&self, caller: Caller, param: &Param) -> Result<()>;
    fn get(&self, param: &mut Param) -> Result<()>;
    fn submit(&self, context: u32, slot: u32, d: &Descriptor) -> Result<Fence>;
    fn fence(&self, fence: Fence) -> Result<FenceState>;
    fn busy(&self, fence: Fence) -> Result<(u32, u32)>;
    fn advance(&self, context: u32, value: u64) -> Result<()>;
    fn tune(&self, engine: EngineId, tunables: Tunables) -> Result<()>;
    /// Busy nanoseconds of all engines.
    fn busy_times(&self) -> Vec<u64>;
}

/// The library.
pub struct Library(pub Arc<Device>);

impl Calls for Library {
    fn create(&self, caller: Caller, flags: u32, extensions: u64) -> Result<u32> {
        self.0.create_context(caller, flags, extensions)
    }

    fn destroy(&self, context: u32) -> Result<()> {
        self.0.destroy_context(context)
    }

    fn set(&self, caller: Caller, param: &Param) -> Result<()> {
        self.0.set_param(caller, param)
    }

    fn get(&self, param: &mut Param) -> Result<()> {
        self.0.get_param(param)
    }

    fn submit(&self, context: u32, slot: u32, d: &Descriptor) -> Result<Fence> {
        self.0.submit(context, slot, d)
    }

    fn fence(&self, fence: Fence) -> Result<FenceState> {
        self.0.fence(fence)
    }

    fn busy(&self, fence: Fence) -> Result<(u32, u32)> {
        self.0.busy(fence)
    }

    fn advance(&self, context: u32, value: u64) -> Result<()> {
        self.0.advance_client(context, value)
    }

    fn tune(&self, engine: EngineId, tunables: Tunables) -> Result<()> {
        self.0.tune(engine, tunables)
    }

    fn busy_times(&self) -> Vec<u64> {
        self.0.engines().iter().map(|engine| engine.busy).collect()
    }
}

/// Gives the test every device that the function makes, to work on it by a clock of the test's.
struct Virtual {
    clock: Arc<VirtualClock>,
    device: Arc<Mutex<Option<Arc<Device>>>>,
}

/// Somebody works on a device as long as the test wants to.
struct ByHand;

impl Driven for ByHand {
    fn resumed(&self) {}

    fn ring(&self, _: u32) {}
}

impl Drive for Virtual {
    fn clock(&self) -> Arc<dyn Clock> {
        self.clock.clone()
    }

    fn start(&self, device: &Arc<Device>, _: &Bells) -> io::Result<Box<dyn Driven>> {
        // The list wants a second address space; it is the same memory.
        device.set_space(1, device.space(FIRST_SPACE).map_err(io::Error::other)?);
        *self.device.lock().unwrap() = Some(device.clone());
        Ok(Box::new(ByHand))
    }
}

/// A device process, but for the process.
struct Served {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        let ended = self.thread.take().unwrap().join();
        // While a test fails already there is nothing to add.
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

/// The client's memory, a file: usable from `base` on.
pub struct Ram {
    file: File,
    base: u64,
}

impl Ram {
    pub fn new(base: u64) -> Self {
        let file = memfd_create("client", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, READ_ONLY + 0x1000 - base).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        Self { file: file.into(), base }
    }
}

impl AddressSpace for Ram {
    fn read(&self, at: u64, to: &mut [u8]) -> std::result::Result<(), Fault> {
        let fault = Fault { at, bytes: to.len() as u64, access: Access::Read };
        self.file.read_exact_at(to, at - self.base).map_err(|_| fault)
    }

    fn write(&self, at: u64, from: &[u8]) -> std::result::Result<(), Fault> {
        let fault = Fault { at, bytes: from.len() as u64, access: Access::Write };
        self.file.write_all_at(from, at - self.base).map_err(|_| fault)
    }

    fn copy(&self, _: u64, _: u64, _: u64) -> std::result::Result<(), Fault> {
        panic!("a client reads and writes");
    }

    fn atomic(&self, _: u64, _: Width, _: Atomic) -> std::result::Result<u64, Fault> {
        panic!("a client reads and writes");
    }

    fn publish(&self, _: u64, _: u8) -> std::result::Result<(), Fault> {
        panic!("a client reads and writes");
    }

    fn check(&self, _: u64, _: u64, _: Access) -> std::result::Result<(), Fault> {
        panic!("a client reads and writes");
    }
}

/// The function behind a socket.
pub struct Socket {
    // Closed before the server ends.
    client: Client,
    privileged: Arc<AtomicBool>,
    memory: Arc<Ram>,
    device: Arc<Mutex<Option<Arc<Device>>>>,
    _served: Served,
}

/// Where commands are: in a page that no test uses.
const COMMAND: u64 = END - 0x2000;

impl Socket {
    pub fn new(host: Host, clock: Arc<VirtualClock>, seed: u64, memory: Arc<Ram>) -> Self {
        let (device, privileged) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let model = Model {
            catalogue: Catalogue::with_counts(COUNTS).unwrap(),
            host,
            drive: Box::new(Virtual { clock, device: Arc::clone(&device) }),
            privileged: privileged.clone(),
            seed,
            fleet: None,
            keys: Vec::new(),
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let server = Server::bind(&path).unwrap();
        let mut function = AccelFunction::new(model).unwrap();
        let mut host = server::Host::new(&function).unwrap();
        let stop = host.stop();
        let thread = std::thread::spawn(move || server.serve(&mut host, &mut function).unwrap());
        let served = Served { stop, thread: Some(thread), _directory: directory };
        let client = Client::connect(&path, Options::default(), Arc::new(NoMemory)).unwrap();
        let file = |at: u64| Some((memory.file.as_fd(), at - memory.base));
        client.dma_map(memory.base, END - memory.base, file(memory.base), true, true).unwrap();
        client.dma_map(READ_ONLY, 0x1000, file(READ_ONLY), true, false).unwrap();
        client.write(pci_region::CONFIG, 4, &[6, 0]).unwrap();
        Self { client, privileged, memory, device, _served: served }
    }

    /// The device behind the function, whose workers are the test's.
    pub fn device(&self) -> Arc<Device> {
        self.device.lock().unwrap().clone().unwrap()
    }

    /// Stops the device, whose workers have nothing any more, and reads its state.
    pub fn save(&self) -> Vec<u8> {
        self.client.set_state(State::StopCopy).unwrap();
        let mut state = Vec::new();
        while let Some(piece) = Some(self.client.read_data(1 << 16).unwrap()).filter(|piece| !piece.is_empty()) {
            state.extend(piece);
        }
        state
    }

    /// Takes a state, and stands still.
    pub fn load(&self, state: &[u8]) {
        self.client.set_state(State::Resuming).unwrap();
        state.chunks(1 << 16).for_each(|piece| self.client.write_data(piece).unwrap());
        self.client.set_state(State::Stop).unwrap();
    }

    /// Goes on.
    pub fn go_on(&self) {
        self.client.set_state(State::Running).unwrap();
    }

    fn caller(&self, caller: Caller) {
        self.privileged.store(caller.privileged, Ordering::SeqCst);
    }

    fn read(&self, at: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        self.client.read(0, at, &mut bytes[..width]).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn write(&self, at: u64, width: usize, value: u64) {
        self.client.write(0, at, &value.to_le_bytes()[..width]).unwrap();
    }

    /// Does a command; its block as it is then.
    fn command(&self, number: u32, words: &[u32]) -> Result<[u32; 16]> {
        let mut block = [0u32; 16];
        block[0] = number;
        block[2..2 + words.len()].copy_from_slice(words);
        let bytes: Vec<u8> = block.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory.write(COMMAND, &bytes).unwrap();
        self.write(register::COMMAND, 8, COMMAND);
        error(self.read(register::RESULT, 4))?;
        let mut bytes = [0; 64];
        self.memory.read(COMMAND, &mut bytes).unwrap();
        Ok(std::array::from_fn(|word| u32::from_le_bytes(bytes[4 * word..][..4].try_into().unwrap())))
    }

    /// Where the registers of a slot are, if it can have any.
    fn registers(context: u32, slot: u32) -> Result<u64> {
        let place = u64::from(context & 0xffff);
        match slot < 64 && place > 0 {
            true => {
                let context = register::CONTEXTS_BASE + (place - 1) * register::CONTEXT_BYTES;
                Ok(context + slot_register::BYTES * u64::from(slot))
            }
            false => Err(Refused::new(Errno::Invalid, "no registers")),
        }
    }
}

/// The error that a register has.
fn error(number: u64) -> Result<()> {
    match number {
        0 => Ok(()),
        number => Err(Refused::new(Errno::from_number(number as u16).unwrap(), "by a register")),
    }
}

fn argument(param: &Param) -> [u32; 6] {
    let halves = |word: u64| [word as u32, (word >> 32) as u32];
    let [[param_low, param_high], [value_low, value_high]] = [param.param, param.value].map(halves);
    [param.context, param.size, param_low, param_high, value_low, value_high]
}

fn point(fence: Fence) -> [u32; 4] {
    [fence.context, fence.slot, fence.seq as u32, (fence.seq >> 32) as u32]
}

impl Calls for Socket {
    fn create(&self, caller: Caller, flags: u32, extensions: u64) -> Result<u32> {
        self.caller(caller);
        self.command(command::CREATE, &[flags, 0, extensions as u32, (extensions >> 32) as u32])?;
        Ok(self.read(register::CREATED, 4) as u32)
    }

    fn destroy(&self, context: u32) -> Result<()> {
        self.command(command::DESTROY, &[context]).map(|_| ())
    }

    fn set(&self, caller: Caller, param: &Param) -> Result<()> {
        self.caller(caller);
        self.command(command::SET_PARAM, &argument(param)).map(|_| ())
    }

    fn get(&self, param: &mut Param) -> Result<()> {
        let block = self.command(command::GET_PARAM, &argument(param))?;
        (param.size, param.value) = (block[3], u64::from(block[6]) | u64::from(block[7]) << 32);
        Ok(())
    }

    /// By the portal. A slot that has no registers reads as ones: whether it is the slot or the context that is not there, a client
    /// finds out by asking for something else of the context.
    fn submit(&self, context: u32, slot: u32, d: &Descriptor) -> Result<Fence> {
        let registers = Self::registers(context, slot)?;
        let status = registers + slot_register::STATUS;
        if self.read(status, 4) == u64::from(u32::MAX) {
            let mut priority = Param { context, size: 0, param: wherry_accel::abi::param::PRIORITY, value: 0 };
            self.get(&mut priority)?;
            return Err(Refused::new(Errno::Invalid, "no registers"));
        }
        self.client.write(0, registers + register::PORTALS, &d.encode()).unwrap();
        error(self.read(status, 4))?;
        Ok(Fence { context, slot, seq: self.read(registers + slot_register::SUBMITTED, 8) })
    }

    fn fence(&self, fence: Fence) -> Result<FenceState> {
        let block = self.command(command::FENCE, &point(fence))?;
        Ok(match (block[6], block[7]) {
            (0, 0) => FenceState::Pending,
            (1, 0) => FenceState::Signalled,
            (2, errno) => FenceState::Failed(Errno::from_number(errno as u16).unwrap()),
            other => panic!("the state of a fence: {other:?}"),
        })
    }

    fn busy(&self, fence: Fence) -> Result<(u32, u32)> {
        let block = self.command(command::BUSY, &point(fence))?;
        Ok((block[6], block[7]))
    }

    fn advance(&self, context: u32, value: u64) -> Result<()> {
        self.write(Self::registers(context, 0)? + slot_register::CLIENT, 8, value);
        Ok(())
    }

    fn tune(&self, engine: EngineId, tunables: Tunables) -> Result<()> {
        self.caller(Caller::PRIVILEGED);
        let count = self.read(register::ENGINES, 4);
        let id = u64::from(engine.class) | u64::from(engine.instance) << 16;
        let index = (0..count).find(|index| self.read(register::ENGINE_TABLE + 16 * index, 4) == id).unwrap();
        let times = [tunables.slice, tunables.preempt_timeout, tunables.heartbeat];
        for (at, time) in (register::TUNABLES + 16 * index..).step_by(4).zip(times) {
            assert!(time.is_multiple_of(1000), "registers have microseconds");
            self.write(at, 4, time / 1000);
        }
        Ok(())
    }

    fn busy_times(&self) -> Vec<u64> {
        let count = self.read(register::ENGINES, 4);
        (0..count).map(|index| self.read(register::ENGINE_TABLE + 16 * index + 8, 8)).collect()
    }
}
