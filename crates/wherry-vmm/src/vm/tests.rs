//! Machines whose guest is a handful of instructions, and whose devices are the test's.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use wherry_memory::{DirtySource, GRANULE, PageSet};
use wherry_migration::machine::Machine;
use wherry_state::SavedState;

use super::*;
use crate::config::{CpuModel, SerialTarget};
use crate::units::clock::saved::ClockState;
use wherry_pci::bus::BusDevice;

const LIMIT: Duration = Duration::from_secs(30);
/// Where the guests count.
const COUNTER: u64 = 0x20_0000;

/// An ELF with a PVH entry at 1 MiB and this code there. It starts in 32-bit protected mode, in ring 0.
fn elf(code: &[u8]) -> tempfile::NamedTempFile {
    const LOAD: u64 = 0x10_0000;
    let note_at = 64 + 2 * 56u64;
    let code_at = note_at + 20;
    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    image.extend([2u16, 62].iter().flat_map(|v| v.to_le_bytes()));
    image.extend(1u32.to_le_bytes());
    // Entry, program headers, no section headers.
    image.extend([LOAD, 64, 0].iter().flat_map(|v| v.to_le_bytes()));
    image.extend(0u32.to_le_bytes());
    image.extend([64u16, 56, 2, 64, 0, 0].iter().flat_map(|v| v.to_le_bytes()));
    let mut program = |kind: u32, flags: u32, words: [u64; 6]| {
        image.extend([kind, flags].iter().flat_map(|v| v.to_le_bytes()));
        image.extend(words.iter().flat_map(|v| v.to_le_bytes()));
    };
    let len = code.len() as u64;
    program(1, 7, [code_at, LOAD, LOAD, len, len, 4096]);
    program(4, 4, [note_at, 0, 0, 20, 20, 4]);
    // XEN_ELFNOTE_PHYS32_ENTRY
    image.extend([4u32, 4, 18].iter().flat_map(|v| v.to_le_bytes()));
    image.extend(b"Xen\0");
    image.extend((LOAD as u32).to_le_bytes());
    image.extend(code);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&image).unwrap();
    file
}

fn config(kernel: &Path, cpus: u32) -> MachineConfig {
    MachineConfig {
        name: "tiny".into(),
        vm: [9; 16],
        memory: 16 << 20,
        hugepages: false,
        cpus,
        cpu: CpuModel::Host,
        kernel: Kernel::Path(kernel.to_path_buf()),
        initrd: None,
        cmdline: String::new(),
        serial: SerialTarget::Null,
        pci: Default::default(),
    }
}

fn boot(code: &[u8]) -> Arc<Vm> {
    Vm::boot(config(elf(code).path(), 1)).unwrap()
}

fn counter(vm: &Vm) -> u32 {
    vm.ram.memory().read_obj(GuestAddress(COUNTER)).unwrap()
}

fn until(vm: &Vm, what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert_eq!(vm.notice.reason(), None, "while waiting for {what}");
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        std::thread::yield_now();
    }
}

/// A machine like `vm`, built as a destination builds it, with the same RAM content and nothing else.
fn twin(vm: &Vm) -> Vm {
    let host = Arc::new(Host::open().unwrap());
    let ram = Arc::new(Ram::create(&layout::ram_blocks(vm.ram.size(), PageSize::Base)).unwrap());
    let faults = Err("all of its memory is here".into());
    let made = Vm::make(
        &host,
        ram,
        faults,
        vm.description.clone(),
        vm.identity,
        "twin".into(),
        Backing::bare(&SerialTarget::Null),
    )
    .unwrap();
    made.started_by_engine()
}

fn copy_ram(from: &Vm, to: &Vm) {
    for block in from.ram.blocks() {
        for run in block.data_runs(0..u64::MAX) {
            let run = run.unwrap();
            let mut bytes = vec![0; (run.end - run.start) as usize];
            block.read_at(run.start, &mut bytes).unwrap();
            to.ram.memory().write_slice(&bytes, GuestAddress(block.spec().guest_base + run.start)).unwrap();
        }
    }
}

/// Every read gives the next number.
#[derive(Default)]
struct Sequence(AtomicU32);

impl BusDevice for Sequence {
    fn read(&self, _: u64, _: u64, data: &mut [u8]) {
        data.copy_from_slice(&self.0.fetch_add(1, Ordering::SeqCst).to_le_bytes());
    }
    fn write(&self, _: u64, _: u64, _: &[u8]) {}
}

/// Reads the sequence and counts along; a number that is not the next one ends in a triple fault.
fn sequence_reader(read: &[u8]) -> Vec<u8> {
    let mut code = vec![0x31, 0xdb, 0x66, 0xba, 0x00, 0x05]; // xor ebx, ebx; mov dx, 0x500
    let start = code.len();
    code.extend(read); // eax = the next number
    code.extend([0x39, 0xd8, 0x75, 0x09]); // cmp eax, ebx; jne fail
    code.extend([0x43, 0x89, 0x1d, 0x00, 0x00, 0x20, 0x00]); // inc ebx; mov [COUNTER], ebx
    code.extend([0xeb, (start as i64 - code.len() as i64 - 2) as u8]); // jmp start
    code.extend([0x0f, 0x0b]); // fail: ud2, without an IDT
    code
}

#[test]
fn an_access_to_a_device_that_is_under_way_at_the_stop_is_neither_lost_nor_done_twice() {
    // in eax, dx; mov eax, [0xfed60000]
    for read in [&[0xed][..], &[0xa1, 0x00, 0x00, 0xd6, 0xfe]] {
        let device = Arc::new(Sequence::default());
        let plug = |vm: &Vm| {
            vm.devices.buses().pio.insert(0x500, 4, device.clone()).unwrap();
            vm.devices.buses().mmio.insert(0xfed6_0000, 4, device.clone()).unwrap();
        };
        let mut vm = boot(&sequence_reader(read));
        plug(&vm);
        vm.resume().unwrap();
        for _ in 0..30 {
            let before = counter(&vm);
            until(&vm, "the guest to read on", || counter(&vm) > before + 20);
            let there = twin(&vm);
            plug(&there);
            vm.units().stop(LIMIT).unwrap();
            let state = vm.units().save().unwrap();
            copy_ram(&vm, &there);
            there.units().restore(&state).unwrap();
            there.units().start().unwrap();
            vm = Arc::new(there);
        }
        let before = counter(&vm);
        until(&vm, "the guest to read on there", || counter(&vm) > before + 20);
    }
}

#[test]
fn a_triple_fault_ends_the_machine_with_its_registers() {
    let vm = boot(&[0x0f, 0x0b]);
    vm.resume().unwrap();
    let Some(ExitReason::Crash(crash)) = vm.wait_exit(Some(Instant::now() + LIMIT)) else {
        panic!("no crash: {:?}", vm.notice.reason());
    };
    assert_eq!(crash.vcpu, 0);
    // SVM resets the vCPU before it tells of the fault, so the values are not always those of the guest.
    assert!(crash.registers.iter().any(|(name, _)| *name == "rip"), "{crash}");
    assert!(matches!(vm.state(), VmState::Ended(ExitReason::Crash(_))));
    let error = vm.units().stop(LIMIT).unwrap_err().to_string();
    assert!(error.contains("vcpu[0]") && error.contains("has ended"), "a crashed machine does not migrate: {error}");
}

#[test]
fn a_reset_ends_the_machine_and_nothing_after_it_is_executed() {
    // mov al, 0xfe; out 0x64, al; inc dword [COUNTER]; jmp $
    let vm = boot(&[0xb0, 0xfe, 0xe6, 0x64, 0xff, 0x05, 0, 0, 0x20, 0, 0xeb, 0xfe]);
    vm.resume().unwrap();
    assert_eq!(vm.wait_exit(Some(Instant::now() + LIMIT)), Some(ExitReason::Reset));
    assert!(vm.vcpus.wait_rest(Instant::now() + LIMIT).is_empty());
    assert_eq!(counter(&vm), 0);
}

/// inc dword [COUNTER]; jmp
const COUNTING: &[u8] = &[0xff, 0x05, 0, 0, 0x20, 0, 0xeb, 0xf8];

/// Holds whoever reads it until it is let go.
#[derive(Default)]
struct Stuck(Mutex<bool>, std::sync::Condvar, AtomicU32);

impl BusDevice for Stuck {
    fn read(&self, _: u64, _: u64, data: &mut [u8]) {
        data.fill(0);
        self.2.store(1, Ordering::SeqCst);
        let mut free = self.0.lock().unwrap();
        while !*free {
            free = self.1.wait(free).unwrap();
        }
    }
    fn write(&self, _: u64, _: u64, _: &[u8]) {}
}

#[test]
fn a_vcpu_that_does_not_come_to_rest_is_named_and_the_machine_runs_on() {
    // mov dx, 0x500; in eax, dx; then count
    let mut code = vec![0x66, 0xba, 0x00, 0x05, 0xed];
    code.extend(COUNTING);
    let vm = boot(&code);
    let device = Arc::new(Stuck::default());
    vm.devices.buses().pio.insert(0x500, 4, device.clone()).unwrap();
    vm.resume().unwrap();
    until(&vm, "the guest to reach the device", || device.2.load(Ordering::SeqCst) == 1);
    let error = vm.pause_within(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(&error, VmError::NotAtRest { vcpus, .. } if vcpus == &[0]), "{error}");
    assert_eq!(vm.state(), VmState::Running);
    let error = vm.units().stop(Duration::from_millis(50)).unwrap_err().to_string();
    assert!(error.contains("vcpu[0]: not finished at its deadline"), "{error}");
    vm.units().start().unwrap();
    *device.0.lock().unwrap() = true;
    device.1.notify_all();
    until(&vm, "the guest to go on", || counter(&vm) > 100);
    vm.pause().unwrap();
}

#[test]
fn without_manual_protection_the_log_is_read_and_cleared_at_once() {
    let mut host = Host::open().unwrap();
    host.manual_dirty_log = false;
    let vm = Vm::boot_on(Arc::new(host), config(elf(COUNTING).path(), 1)).unwrap();
    vm.resume().unwrap();
    until(&vm, "the guest to count", || counter(&vm) > 100);
    let sources = vm.dirty_sources();
    let (log, block): (&Arc<dyn DirtySource>, _) = (&sources[0], &vm.ram.blocks()[0]);
    log.start().unwrap();
    let collect = || {
        let mut set = PageSet::new(block.pages());
        log.collect(block, &mut set).unwrap();
        set
    };
    for _ in 0..20 {
        let before = counter(&vm);
        until(&vm, "the guest to count on", || counter(&vm) > before + 10);
        vm.pause().unwrap();
        let set = collect();
        assert!(set.contains(COUNTER / GRANULE));
        log.rearm(block, 0..block.pages(), &set).unwrap();
        assert!(collect().is_empty(), "reading has cleared it");
        vm.resume().unwrap();
    }
}

/// rdtsc; store it at COUNTER + 8; if it went back count at COUNTER + 16; inc dword [COUNTER]; jmp
fn clock_watcher() -> Vec<u8> {
    let mut code = vec![0x31, 0xf6, 0x31, 0xff]; // xor esi, esi; xor edi, edi: the last TSC, low and high
    let start = code.len();
    code.extend([0x0f, 0x31]); // rdtsc
    code.extend([0x89, 0xd3, 0x89, 0xc1]); // mov ebx, edx; mov ecx, eax
    code.extend([0x29, 0xf0, 0x19, 0xfa]); // sub eax, esi; sbb edx, edi
    code.extend([0x73, 0x06]); // jnc +6
    code.extend([0xff, 0x05, 0x10, 0x00, 0x20, 0x00]); // inc dword [COUNTER + 16]
    code.extend([0x89, 0xce, 0x89, 0xdf]); // mov esi, ecx; mov edi, ebx
    code.extend([0x89, 0x35, 0x08, 0x00, 0x20, 0x00]); // mov [COUNTER + 8], esi
    code.extend([0x89, 0x3d, 0x0c, 0x00, 0x20, 0x00]); // mov [COUNTER + 12], edi
    code.extend([0xff, 0x05, 0x00, 0x00, 0x20, 0x00]); // inc dword [COUNTER]
    code.extend([0xeb, (start as i64 - code.len() as i64 - 2) as u8]); // jmp start
    code
}

#[test]
fn the_tsc_goes_on_on_another_host_by_the_time_that_has_passed_and_never_back() {
    // How far the destination's wall clock is ahead of the source's, beside what really passes.
    for ahead_s in [0i64, 5, -5] {
        let vm = boot(&clock_watcher());
        vm.resume().unwrap();
        until(&vm, "the guest to read its TSC", || counter(&vm) > 100);
        let there = twin(&vm);
        vm.units().stop(LIMIT).unwrap();
        let mut state = vm.units().save().unwrap();
        let at = state.sections.iter().position(|s| s.unit == "clock").unwrap();
        let mut clock = ClockState::from_section(&state.sections[at]).unwrap();
        clock.boot_id = "another host".into();
        clock.realtime_ns = clock.realtime_ns.wrapping_add_signed(-ahead_s * 1_000_000_000);
        state.sections[at] = clock.to_section(&state.sections[at].id());
        copy_ram(&vm, &there);
        let tsc = |vm: &Vm| vm.ram.memory().read_obj::<u64>(GuestAddress(COUNTER + 8)).unwrap();
        let before = tsc(&vm);
        let stopped = ioctl::host_tsc();
        if !Host::open().unwrap().tsc_movable {
            // Here the guest reads the host's TSC. The move is refused, in the handshake and again at the restore.
            let error = there.units().restore(&state).unwrap_err().to_string();
            assert!(error.contains("does not move the guest's TSC"), "{error}");
            continue;
        }
        there.units().restore(&state).unwrap();
        there.units().start().unwrap();
        let count = counter(&there);
        until(&there, "the guest to read its TSC there", || counter(&there) > count + 10);
        there.pause().unwrap();
        let really = ioctl::host_tsc() - stopped;
        let passed = tsc(&there).checked_sub(before).expect("it went back");
        let second = u64::from(vm.description.tsc_khz) * 1000;
        let jump = ahead_s.max(0) as u64 * second;
        assert!(passed >= jump, "{ahead_s} s: {passed} of {jump}");
        // What passed between the save and `stopped` is not counted in `really`; a second is far more than that.
        assert!(passed <= jump + really + second, "{ahead_s} s: {passed}, not {jump} + {really}");
        let backwards: u32 = there.ram.memory().read_obj(GuestAddress(COUNTER + 16)).unwrap();
        assert_eq!(backwards, 0);
    }
}

#[test]
fn on_the_same_host_the_tsc_offset_stays_as_it_is() {
    let vm = boot(&clock_watcher());
    vm.resume().unwrap();
    until(&vm, "the guest to read its TSC", || counter(&vm) > 100);
    let there = twin(&vm);
    vm.units().stop(LIMIT).unwrap();
    there.units().restore(&vm.units().save().unwrap()).unwrap();
    let offset = |vm: &Vm| ioctl::get_tsc_offset(&vm.vcpus.iter().next().unwrap().fd()).unwrap();
    assert_eq!(offset(&there), offset(&vm));
}

#[test]
fn a_vcpus_state_comes_back_bit_by_bit() {
    let vm = boot(&sequence_reader(&[0xed]));
    vm.devices.buses().pio.insert(0x500, 4, Arc::new(Sequence::default())).unwrap();
    vm.resume().unwrap();
    until(&vm, "the guest to read on", || counter(&vm) > 20);
    vm.units().stop(LIMIT).unwrap();
    let state = vm.units().save().unwrap();
    let there = twin(&vm);
    copy_ram(&vm, &there);
    there.units().restore(&state).unwrap();
    let again = there.units().save().unwrap();
    for unit in ["vcpu", "irqchip"] {
        let get = |file: &wherry_state::StateFile| file.sections.iter().find(|s| s.unit == unit).unwrap().clone();
        if unit == "irqchip" {
            assert_eq!(get(&state), get(&again));
            continue;
        }
        use crate::units::vcpu::saved::VcpuState;
        let [before, after] = [&state, &again].map(|f| VcpuState::from_section(&get(f)).unwrap());
        // The TSC goes on, with the same offset.
        assert_eq!(before.tsc.map(|t| (t.offset, t.deadline)), after.tsc.map(|t| (t.offset, t.deadline)));
        assert_eq!(before.msr_numbers, after.msr_numbers);
        for (number, (b, a)) in before.msr_numbers.iter().zip(before.msr_values.iter().zip(&after.msr_values)) {
            assert_eq!(b, a, "MSR {number:#x}");
        }
        let rest = |s: VcpuState| VcpuState { tsc: None, ..s };
        assert_eq!(rest(before), rest(after));
    }
}

#[test]
fn mtrrs_and_the_machine_check_bank_come_over() {
    use crate::units::vcpu::msrs;
    let vm = boot(COUNTING);
    let first = |vm: &Vm| vm.vcpus.iter().next().unwrap().clone();
    assert_eq!(msrs::get(&first(&vm).fd(), 0x2ff), Some(0xc06 & !0x400), "MTRRs are on and write-back");
    let (numbers, values) = (vec![0x2ff, 0x200, 0x201, 0x250, 0x400], vec![0xc06, 6, 0xff_8000_0800, 0x0606, 0]);
    msrs::set(&first(&vm).fd(), &numbers, &values).unwrap();
    vm.units().stop(LIMIT).unwrap();
    let there = twin(&vm);
    there.units().restore(&vm.units().save().unwrap()).unwrap();
    for (number, value) in numbers.iter().zip(values) {
        assert_eq!(msrs::get(&first(&there).fd(), *number), Some(value), "{number:#x}");
    }
}
