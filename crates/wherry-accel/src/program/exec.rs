//! Runs verified instructions.

use crate::memory::{Access, AddressSpace, Atomic, Fault, Width};

use super::{FRAME_BYTES, Frame, Instruction, MAX_FRAMES, Machine, Progress, STACK_BASE, STACK_BYTES, op};

impl Machine {
    /// Runs at most `limit` instructions.
    pub fn run(&mut self, space: &dyn AddressSpace, limit: u64) -> Progress {
        for _ in 0..limit {
            if self.fuel == 0 {
                return Progress::NoFuel;
            }
            self.fuel -= 1;
            match self.one(space) {
                Ok(None) => {}
                Ok(Some(end)) => return end,
                Err(fault) => return Progress::Fault(fault),
            }
        }
        Progress::More
    }

    fn one(&mut self, space: &dyn AddressSpace) -> Result<Option<Progress>, Fault> {
        let at = self.pc as usize;
        let i = Instruction::decode(self.text[at]);
        let mut next = at as i64 + 1;
        let (class, code, register) = (i.opcode & 7, i.opcode >> 4, i.opcode & op::REG != 0);
        let operand = if register { self.registers[i.src] } else { i64::from(i.imm) as u64 };
        match class {
            op::ALU64 => self.registers[i.dst] = alu64(&i, code, self.registers[i.dst], operand, register),
            op::ALU => self.registers[i.dst] = alu32(&i, code, self.registers[i.dst], operand, register),
            op::LD => {
                self.registers[i.dst] = u64::from(i.imm as u32) | self.text[at + 1] >> 32 << 32;
                next += 1;
            }
            op::LDX => {
                let signed = i.opcode & 0xe0 == op::MODE_MEMSX;
                let address = self.registers[i.src].wrapping_add(i64::from(i.offset) as u64);
                self.registers[i.dst] = self.value_at(space, address, i.opcode & 0x18, signed)?;
            }
            op::ST | op::STX => {
                let address = self.registers[i.dst].wrapping_add(i64::from(i.offset) as u64);
                if i.opcode & 0xe0 == op::MODE_ATOMIC {
                    self.atomic(space, &i, address)?;
                } else {
                    let value = if class == op::ST { i64::from(i.imm) as u64 } else { self.registers[i.src] };
                    self.store(space, address, i.opcode & 0x18, value)?;
                }
            }
            _ => match code {
                op::EXIT => match self.frames.pop() {
                    None => return Ok(Some(Progress::Exit(self.registers[0]))),
                    Some(frame) => {
                        self.registers[6..10].copy_from_slice(&frame.kept);
                        self.registers[10] -= FRAME_BYTES;
                        next = frame.back.into();
                    }
                },
                op::CALL => {
                    if self.frames.len() + 1 >= MAX_FRAMES {
                        return Ok(Some(Progress::TooDeep));
                    }
                    let mut kept = [0; 4];
                    kept.copy_from_slice(&self.registers[6..10]);
                    self.frames.push(Frame { back: next as u32, kept });
                    self.registers[10] += FRAME_BYTES;
                    next += i64::from(i.imm);
                }
                op::JA => next += if class == op::JMP { i.offset.into() } else { i64::from(i.imm) },
                _ => {
                    let (a, b) = (self.registers[i.dst], operand);
                    let taken = match class {
                        op::JMP => compare(code, a, b, a as i64, b as i64),
                        _ => {
                            let (a, b) = (a as u32, b as u32);
                            compare(code, a.into(), b.into(), (a as i32).into(), (b as i32).into())
                        }
                    };
                    if taken {
                        next += i64::from(i.offset);
                    }
                }
            },
        }
        // The verifier has seen that every instruction leads to another one.
        self.pc = next as u32;
        Ok(None)
    }

    /// The place on the stack of a range that lies on it.
    fn on_stack(&self, address: u64, bytes: u64) -> Option<std::ops::Range<usize>> {
        let offset = address.checked_sub(STACK_BASE)?;
        let end = offset.checked_add(bytes)?;
        // Frames above the running one are out of reach, as in any other stack.
        let top = (self.frames.len() as u64 + 1) * FRAME_BYTES;
        (end <= top.min(STACK_BYTES)).then_some(offset as usize..end as usize)
    }

    fn value_at(&self, space: &dyn AddressSpace, address: u64, size: u8, signed: bool) -> Result<u64, Fault> {
        let bytes = bytes_of(size);
        let mut word = [0; 8];
        match self.on_stack(address, bytes as u64) {
            Some(range) => word[..bytes].copy_from_slice(&self.stack[range]),
            None => {
                outside(address, bytes as u64, Access::Read).and_then(|()| space.read(address, &mut word[..bytes]))?
            }
        }
        let value = u64::from_le_bytes(word);
        let shift = 64 - 8 * bytes as u32;
        Ok(if signed { ((value << shift) as i64 >> shift) as u64 } else { value })
    }

    fn store(&mut self, space: &dyn AddressSpace, address: u64, size: u8, value: u64) -> Result<(), Fault> {
        let bytes = bytes_of(size);
        let word = value.to_le_bytes();
        match self.on_stack(address, bytes as u64) {
            Some(range) => self.stack[range].copy_from_slice(&word[..bytes]),
            None => {
                outside(address, bytes as u64, Access::Write)?;
                space.write(address, &word[..bytes])?;
            }
        }
        Ok(())
    }

    fn atomic(&mut self, space: &dyn AddressSpace, i: &Instruction, address: u64) -> Result<(), Fault> {
        let width = if i.opcode & 0x18 == op::SIZE_DW { Width::Eight } else { Width::Four };
        let mask = if width == Width::Eight { u64::MAX } else { u32::MAX.into() };
        let value = self.registers[i.src] & mask;
        let operation = match i.imm {
            op::ATOMIC_XCHG => Atomic::Exchange(value),
            op::ATOMIC_CMPXCHG => Atomic::CompareExchange { expected: self.registers[0] & mask, new: value },
            other => match other & !op::ATOMIC_FETCH {
                op::ATOMIC_OR => Atomic::Or(value),
                op::ATOMIC_AND => Atomic::And(value),
                op::ATOMIC_XOR => Atomic::Xor(value),
                _ => Atomic::Add(value),
            },
        };
        let old = match self.on_stack(address, width.bytes()) {
            // The stack belongs to the program alone.
            Some(range) => {
                let size = if width == Width::Eight { op::SIZE_DW } else { op::SIZE_W };
                let old = self.value_at(space, address, size, false)?;
                let new = match operation {
                    Atomic::Load => old,
                    Atomic::Add(v) => old.wrapping_add(v),
                    Atomic::Or(v) => old | v,
                    Atomic::And(v) => old & v,
                    Atomic::Xor(v) => old ^ v,
                    Atomic::Exchange(v) => v,
                    Atomic::CompareExchange { expected, new } => {
                        if old == expected {
                            new
                        } else {
                            old
                        }
                    }
                };
                self.stack[range.clone()].copy_from_slice(&new.to_le_bytes()[..range.len()]);
                old
            }
            None => {
                outside(address, width.bytes(), Access::Write)?;
                space.atomic(address, width, operation)?
            }
        };
        if i.imm == op::ATOMIC_CMPXCHG {
            self.registers[0] = old;
        } else if i.imm & op::ATOMIC_FETCH != 0 {
            self.registers[i.src] = old;
        }
        Ok(())
    }
}

/// Refuses what lies within the stack's addresses, but not on the stack.
fn outside(at: u64, bytes: u64, access: Access) -> Result<(), Fault> {
    match at.checked_add(bytes) {
        Some(end) if end <= STACK_BASE || at >= STACK_BASE + STACK_BYTES => Ok(()),
        _ => Err(Fault { at, bytes, access }),
    }
}

fn bytes_of(size: u8) -> usize {
    match size {
        op::SIZE_W => 4,
        op::SIZE_H => 2,
        op::SIZE_B => 1,
        _ => 8,
    }
}

fn compare(code: u8, a: u64, b: u64, sa: i64, sb: i64) -> bool {
    match code {
        0x1 => a == b,
        0x2 => a > b,
        0x3 => a >= b,
        0x4 => a & b != 0,
        0x5 => a != b,
        0x6 => sa > sb,
        0x7 => sa >= sb,
        0xa => a < b,
        0xb => a <= b,
        0xc => sa < sb,
        // 0xd: the verifier lets no other through.
        _ => sa <= sb,
    }
}

/// RFC 9669, section 4.1: division by zero gives 0, its remainder is the dividend; shifts are masked.
fn alu64(i: &Instruction, code: u8, a: u64, b: u64, register: bool) -> u64 {
    let signed = i.offset == 1;
    match code {
        0x0 => a.wrapping_add(b),
        0x1 => a.wrapping_sub(b),
        0x2 => a.wrapping_mul(b),
        op::DIV if signed => {
            if b == 0 {
                0
            } else {
                (a as i64).wrapping_div(b as i64) as u64
            }
        }
        op::DIV => a.checked_div(b).unwrap_or(0),
        0x4 => a | b,
        0x5 => a & b,
        0x6 => a.wrapping_shl(b as u32),
        0x7 => a.wrapping_shr(b as u32),
        op::NEG => a.wrapping_neg(),
        op::MOD if signed => {
            if b == 0 {
                a
            } else {
                (a as i64).wrapping_rem(b as i64) as u64
            }
        }
        op::MOD => a.checked_rem(b).unwrap_or(a),
        0xa => a ^ b,
        op::MOV if register => extend(b, i.offset),
        op::MOV => b,
        0xc => (a as i64).wrapping_shr(b as u32) as u64,
        _ => swap(a, i.imm, true),
    }
}

fn alu32(i: &Instruction, code: u8, a: u64, b: u64, register: bool) -> u64 {
    if code == op::END {
        // Memory is little-endian here: to_le (source bit 0) cuts off, to_be (1) swaps.
        return swap(a, i.imm, register);
    }
    let (a, b, signed) = (a as u32, b as u32, i.offset == 1);
    u64::from(match code {
        0x0 => a.wrapping_add(b),
        0x1 => a.wrapping_sub(b),
        0x2 => a.wrapping_mul(b),
        op::DIV if signed => {
            if b == 0 {
                0
            } else {
                (a as i32).wrapping_div(b as i32) as u32
            }
        }
        op::DIV => a.checked_div(b).unwrap_or(0),
        0x4 => a | b,
        0x5 => a & b,
        0x6 => a.wrapping_shl(b),
        0x7 => a.wrapping_shr(b),
        op::NEG => a.wrapping_neg(),
        op::MOD if signed => {
            if b == 0 {
                a
            } else {
                (a as i32).wrapping_rem(b as i32) as u32
            }
        }
        op::MOD => a.checked_rem(b).unwrap_or(a),
        0xa => a ^ b,
        op::MOV if register => extend(b.into(), i.offset) as u32,
        op::MOV => b,
        _ => (a as i32).wrapping_shr(b) as u32,
    })
}

fn extend(value: u64, bits: i16) -> u64 {
    match bits {
        8 => value as i8 as i64 as u64,
        16 => value as i16 as i64 as u64,
        32 => value as i32 as i64 as u64,
        _ => value,
    }
}

fn swap(value: u64, bits: i32, swapped: bool) -> u64 {
    match (bits, swapped) {
        (16, true) => (value as u16).swap_bytes().into(),
        (16, false) => value as u16 as u64,
        (32, true) => (value as u32).swap_bytes().into(),
        (32, false) => value as u32 as u64,
        (_, true) => value.swap_bytes(),
        (_, false) => value,
    }
}
