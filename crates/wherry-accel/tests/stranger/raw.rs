//! A client written from `docs/accel-abi.md`, with nothing of the crate in it: numbers of the document, registers by offset,
//! memory as bytes. What it runs on is a [`Bus`], so that the same client can be put before a library or a socket.

use std::collections::BTreeMap;

/// What a driver has: the registers of the device, memory that the device reaches, and time that passes.
pub trait Bus {
    /// Reads a register; `None` where there is none of that width.
    fn read(&mut self, at: u64, width: usize) -> Option<u64>;
    /// Writes to registers: 4, 8 or 64 bytes.
    fn write(&mut self, at: u64, bytes: &[u8]);
    /// Copies out of memory that the device reaches.
    fn peek(&mut self, at: u64, to: &mut [u8]);
    /// Copies into it.
    fn poke(&mut self, at: u64, from: &[u8]);
    /// Lets the device work for a moment.
    fn pass(&mut self);
}

/// "Registers".
pub const RESULT: u64 = 0x28;
pub const STATUS: u64 = 0x14;

/// Looks at memory or a register, with a pass between two, before the test gives up.
const LOOKS: usize = 20_000;

/// A descriptor, field by field.
#[derive(Clone, Copy, Default)]
pub struct Work {
    pub opcode: u8,
    pub flags: u32,
    pub vector: u16,
    pub source: u64,
    pub destination: u64,
    pub size: u32,
    pub word: u32,
    pub first: u64,
    pub second: u64,
}

impl Work {
    pub fn bytes(&self, tag: u32, context: u32, completion: u64) -> [u8; 64] {
        let mut out = Vec::with_capacity(64);
        out.extend(tag.to_le_bytes());
        out.extend(context.to_le_bytes());
        out.extend(&self.flags.to_le_bytes()[..3]);
        out.push(self.opcode);
        out.extend(self.vector.to_le_bytes());
        out.extend([0, 0]);
        out.extend(completion.to_le_bytes());
        out.extend(self.source.to_le_bytes());
        out.extend(self.destination.to_le_bytes());
        out.extend(self.size.to_le_bytes());
        out.extend(self.word.to_le_bytes());
        out.extend(self.first.to_le_bytes());
        out.extend(self.second.to_le_bytes());
        out.try_into().unwrap()
    }
}

/// What a completion record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub status: u8,
    pub opcode: u8,
    pub error: u16,
    pub tag: u32,
    pub bytes: u64,
    pub result: u64,
    pub time: u64,
}

/// The client: it hands out memory from `next` to `end`.
pub struct Raw<B> {
    pub bus: B,
    next: u64,
    end: u64,
    tag: u32,
    /// Where commands are: one after the other in the same place.
    block: Option<u64>,
    /// Rings by (context, slot): where their descriptors are, and how many were put in.
    rings: BTreeMap<(u32, u64), (u64, u32)>,
}

pub const RING: u32 = 8;

impl<B: Bus> Raw<B> {
    pub fn new(bus: B, base: u64, bytes: u64) -> Self {
        Self { bus, next: base, end: base + bytes, tag: 0, block: None, rings: BTreeMap::new() }
    }

    // ---- memory ----

    pub fn room(&mut self, bytes: usize) -> u64 {
        let at = self.next.next_multiple_of(64);
        self.next = at + bytes as u64;
        assert!(self.next <= self.end, "the client has no memory left");
        at
    }

    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.room(bytes.len());
        self.bus.poke(at, bytes);
        at
    }

    pub fn get(&mut self, at: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        self.bus.peek(at, &mut out);
        out
    }

    pub fn word(&mut self, at: u64) -> u32 {
        u32::from_le_bytes(self.get(at, 4).try_into().unwrap())
    }

    pub fn long(&mut self, at: u64) -> u64 {
        u64::from_le_bytes(self.get(at, 8).try_into().unwrap())
    }

    // ---- registers ----

    pub fn register(&mut self, at: u64, width: usize) -> u64 {
        self.bus.read(at, width).unwrap_or_else(|| panic!("no register of {width} bytes at {at:#x}"))
    }

    pub fn set(&mut self, at: u64, width: usize, value: u64) {
        self.bus.write(at, &value.to_le_bytes()[..width]);
    }

    /// Class and instance of every engine.
    pub fn engines(&mut self) -> Vec<(u16, u16)> {
        let count = self.register(0x08, 4);
        let words: Vec<u64> = (0..count).map(|engine| self.register(0x400 + 16 * engine, 4)).collect();
        words.into_iter().map(|word| (word as u16, (word >> 16) as u16)).collect()
    }

    /// "A command is 64 bytes": its number and what follows from byte 8 on. The error number, and the block as it is then.
    pub fn command(&mut self, number: u32, arguments: &[u8]) -> Result<Vec<u8>, u64> {
        let mut block = number.to_le_bytes().to_vec();
        block.extend([0; 4]);
        block.extend(arguments);
        block.resize(64, 0);
        let at = match self.block {
            Some(at) => at,
            None => self.room(64),
        };
        self.block = Some(at);
        self.bus.poke(at, &block);
        self.set(0x20, 8, at);
        match self.register(RESULT, 4) {
            0 => Ok(self.get(at, 64)),
            error => Err(error),
        }
    }

    pub fn create(&mut self, flags: u32, extensions: u64) -> Result<u32, u64> {
        let arguments = [&flags.to_le_bytes()[..], &[0; 4], &extensions.to_le_bytes()].concat();
        self.command(1, &arguments)?;
        Ok(self.register(0x2c, 4) as u32)
    }

    pub fn destroy(&mut self, context: u32) -> Result<(), u64> {
        self.command(2, &context.to_le_bytes()).map(|_| ())
    }

    fn argument(context: u32, size: u32, param: u64, value: u64) -> Vec<u8> {
        [&context.to_le_bytes()[..], &size.to_le_bytes(), &param.to_le_bytes(), &value.to_le_bytes()].concat()
    }

    pub fn set_param(&mut self, context: u32, size: u32, param: u64, value: u64) -> Result<(), u64> {
        self.command(3, &Self::argument(context, size, param, value)).map(|_| ())
    }

    /// Size and value as they were written back.
    pub fn get_param(&mut self, context: u32, size: u32, param: u64, value: u64) -> Result<(u32, u64), u64> {
        let block = self.command(4, &Self::argument(context, size, param, value))?;
        Ok((
            u32::from_le_bytes(block[12..16].try_into().unwrap()),
            u64::from_le_bytes(block[24..32].try_into().unwrap()),
        ))
    }

    fn fence_words(&mut self, number: u32, context: u32, slot: u32, point: u64) -> Result<(u32, u32), u64> {
        let arguments = [&context.to_le_bytes()[..], &slot.to_le_bytes(), &point.to_le_bytes()].concat();
        let block = self.command(number, &arguments)?;
        let word = |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().unwrap());
        Ok((word(24), word(28)))
    }

    /// State and error of a fence.
    pub fn fence(&mut self, context: u32, slot: u32, point: u64) -> Result<(u32, u32), u64> {
        self.fence_words(5, context, slot, point)
    }

    /// Classes that a fence's work runs on, and waits for.
    pub fn busy(&mut self, context: u32, slot: u32, point: u64) -> Result<(u32, u32), u64> {
        self.fence_words(6, context, slot, point)
    }

    // ---- slots ----

    /// Where the doorbell registers of a slot are.
    pub fn doorbells(context: u32, slot: u64) -> u64 {
        0x1_0000 + (u64::from(context & 0xffff) - 1) * 0x2000 + 64 * slot
    }

    pub fn portal(context: u32, slot: u64) -> u64 {
        Self::doorbells(context, slot) + 0x1000
    }

    /// Puts a descriptor into the slot's ring (which is made when there is none) and rings the doorbell.
    pub fn ring(&mut self, context: u32, slot: u64, bytes: &[u8; 64]) {
        let registers = Self::doorbells(context, slot);
        if !self.rings.contains_key(&(context, slot)) {
            let base = self.room(64 * RING as usize);
            self.set(registers, 8, base);
            self.set(registers + 0x08, 4, RING.into());
            self.rings.insert((context, slot), (base, 0));
        }
        let (base, tail) = self.rings[&(context, slot)];
        self.bus.poke(base + 64 * u64::from(tail % RING), bytes);
        self.rings.insert((context, slot), (base, tail + 1));
        self.set(registers + 0x0c, 4, (tail + 1).into());
    }

    /// Runs one piece of work on a slot, by its ring, and waits for its record.
    pub fn run(&mut self, context: u32, slot: u64, work: Work) -> Record {
        let record = self.put(&[0; 32]);
        self.tag += 1;
        let tag = self.tag;
        let bytes = Work { flags: work.flags | 1, ..work }.bytes(tag, context, record);
        self.ring(context, slot, &bytes);
        let record = self.record(record);
        assert_eq!((record.opcode, record.tag), (work.opcode, tag));
        record
    }

    /// The same, for work that must succeed: bytes and result.
    pub fn done(&mut self, context: u32, slot: u64, work: Work) -> (u64, u64) {
        let record = self.run(context, slot, work);
        assert_eq!((record.status, record.error), (1, 0), "operation {:#x}", work.opcode);
        (record.bytes, record.result)
    }

    /// And for work that must fail: its error.
    pub fn fails(&mut self, context: u32, slot: u64, work: Work) -> u16 {
        let record = self.run(context, slot, work);
        assert_eq!(record.status, 2, "operation {:#x}", work.opcode);
        record.error
    }

    /// Waits for a completion record.
    pub fn record(&mut self, at: u64) -> Record {
        self.until("a completion record", |raw| raw.get(at, 1)[0] != 0);
        let b = self.get(at, 32);
        let long = |from: usize| u64::from_le_bytes(b[from..from + 8].try_into().unwrap());
        Record {
            status: b[0],
            opcode: b[1],
            error: u16::from_le_bytes([b[2], b[3]]),
            tag: u32::from_le_bytes(b[4..8].try_into().unwrap()),
            bytes: long(8),
            result: long(16),
            time: long(24),
        }
    }

    pub fn until(&mut self, what: &str, mut there: impl FnMut(&mut Self) -> bool) {
        for _ in 0..LOOKS {
            if there(self) {
                return;
            }
            self.bus.pass();
        }
        panic!("waited for {what}");
    }
}

/// An extension node: its name, what follows its 32 bytes, and then engines.
pub fn node(next: u64, name: u32, fields: &[u8], engines: &[(u16, u16)]) -> Vec<u8> {
    let mut out = next.to_le_bytes().to_vec();
    out.extend(name.to_le_bytes());
    out.extend([0; 20]);
    out.extend(fields);
    engines.iter().for_each(|(class, instance)| {
        out.extend(class.to_le_bytes());
        out.extend(instance.to_le_bytes());
    });
    out
}

/// The map parameter.
pub fn map(extensions: u64, slots: &[(u16, u16)]) -> Vec<u8> {
    let slots = slots.iter().flat_map(|(class, instance)| [class.to_le_bytes(), instance.to_le_bytes()].concat());
    extensions.to_le_bytes().into_iter().chain(slots).collect()
}
