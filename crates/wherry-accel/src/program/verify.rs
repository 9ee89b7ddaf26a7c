//! Checks a program before it runs.

use super::{Instruction, MAX_PROGRAM_BYTES, op};

/// What is wrong with a program, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("instruction {at}: {what}")]
pub struct Flaw {
    /// Index of the instruction, in words of eight bytes.
    pub at: usize,
    /// What is wrong.
    pub what: &'static str,
}

/// Checks a program; answers for each word whether an instruction begins there.
pub fn verify(text: &[u64]) -> Result<Vec<bool>, Flaw> {
    if text.is_empty() || text.len() * 8 > MAX_PROGRAM_BYTES {
        return Err(Flaw { at: 0, what: "a program has 8 to 65536 bytes" });
    }
    let mut starts = vec![true; text.len()];
    let mut at = 0;
    while at < text.len() {
        let instruction = Instruction::decode(text[at]);
        let flaw = |what| Err(Flaw { at, what });
        if instruction.dst > 10 || instruction.src > 10 {
            return flaw("there are registers r0 to r10 only");
        }
        if let Err(what) = check(&instruction) {
            return flaw(what);
        }
        if is_wide(&instruction) {
            match text.get(at + 1) {
                Some(second) if *second as u32 == 0 => starts[at + 1] = false,
                Some(_) => return flaw("the second half of a 64-bit load has bits set that must be zero"),
                None => return flaw("the second half of a 64-bit load is missing"),
            }
            at += 1;
        }
        at += 1;
    }
    for (at, word) in text.iter().enumerate().filter(|(at, _)| starts[*at]) {
        let instruction = Instruction::decode(*word);
        let next = at as i64 + 1 + i64::from(is_wide(&instruction));
        let lands = |target: i64| usize::try_from(target).ok().and_then(|t| starts.get(t)) == Some(&true);
        if let Some(by) = jump(&instruction)
            && !lands(next + by)
        {
            return Err(Flaw { at, what: "it leads to where no instruction begins" });
        }
        if falls_through(&instruction) && !lands(next) {
            return Err(Flaw { at, what: "the program ends without an exit" });
        }
    }
    Ok(starts)
}

fn is_wide(i: &Instruction) -> bool {
    i.opcode == op::LD | op::MODE_IMM | op::SIZE_DW
}

/// By how many words an instruction jumps, if it does.
fn jump(i: &Instruction) -> Option<i64> {
    let (class, code) = (i.opcode & 7, i.opcode >> 4);
    match (class, code) {
        (op::JMP | op::JMP32, op::EXIT) => None,
        (op::JMP32, op::JA) | (op::JMP, op::CALL) => Some(i.imm.into()),
        (op::JMP | op::JMP32, _) => Some(i.offset.into()),
        _ => None,
    }
}

fn falls_through(i: &Instruction) -> bool {
    let (class, code) = (i.opcode & 7, i.opcode >> 4);
    !(matches!(class, op::JMP | op::JMP32) && matches!(code, op::JA | op::EXIT))
}

fn check(i: &Instruction) -> Result<(), &'static str> {
    let (class, code, register) = (i.opcode & 7, i.opcode >> 4, i.opcode & op::REG != 0);
    let (mode, size) = (i.opcode & 0xe0, i.opcode & 0x18);
    let writable = |dst: usize| if dst == 10 { Err("r10 is read only") } else { Ok(()) };
    let zero = |fine: bool| if fine { Ok(()) } else { Err("a field that must be zero is not") };
    match class {
        op::LD => {
            if !is_wide(i) {
                return Err("no such load (packet access is not provided)");
            }
            writable(i.dst)?;
            zero(i.offset == 0)?;
            if i.src != 0 { Err("64-bit loads of maps and variables are not provided") } else { Ok(()) }
        }
        op::LDX => match (mode, size) {
            (op::MODE_MEM, _) | (op::MODE_MEMSX, op::SIZE_B | op::SIZE_H | op::SIZE_W) => {
                writable(i.dst)?;
                zero(i.imm == 0)
            }
            _ => Err("no such load"),
        },
        op::ST => match mode {
            op::MODE_MEM => zero(i.src == 0),
            _ => Err("no such store"),
        },
        op::STX => {
            match (mode, size) {
                (op::MODE_MEM, _) => zero(i.imm == 0),
                (op::MODE_ATOMIC, op::SIZE_W | op::SIZE_DW) => match i.imm & !op::ATOMIC_FETCH {
                    op::ATOMIC_ADD | op::ATOMIC_OR | op::ATOMIC_AND | op::ATOMIC_XOR => {
                        if i.imm & op::ATOMIC_FETCH != 0 { writable(i.src) } else { Ok(()) }
                    }
                    _ if i.imm == op::ATOMIC_XCHG => writable(i.src),
                    _ if i.imm == op::ATOMIC_CMPXCHG => Ok(()),
                    _ => Err("no such atomic operation"),
                },
                _ => Err("no such store"),
            }
        }
        op::ALU | op::ALU64 => {
            writable(i.dst)?;
            match code {
                op::NEG => zero(!register && i.src == 0 && i.imm == 0 && i.offset == 0),
                op::END => {
                    zero(i.src == 0 && i.offset == 0)?;
                    if class == op::ALU64 && register {
                        return Err("no such byte swap");
                    }
                    if matches!(i.imm, 16 | 32 | 64) { Ok(()) } else { Err("bytes are swapped in 16, 32 or 64 bits") }
                }
                op::MOV if register => match (i.offset, class) {
                    (0 | 8 | 16, _) | (32, op::ALU64) => zero(i.imm == 0),
                    _ => Err("no such sign extension"),
                },
                op::DIV | op::MOD => {
                    zero(matches!(i.offset, 0 | 1))?;
                    zero(if register { i.imm == 0 } else { i.src == 0 })
                }
                0x0..=0xc => {
                    zero(i.offset == 0)?;
                    zero(if register { i.imm == 0 } else { i.src == 0 })
                }
                _ => Err("no such arithmetic"),
            }
        }
        _ => match (code, class) {
            (op::JA, op::JMP) => zero(!register && i.dst == 0 && i.src == 0 && i.imm == 0),
            (op::JA, _) => zero(!register && i.dst == 0 && i.src == 0 && i.offset == 0),
            (op::CALL, op::JMP) => {
                zero(!register && i.dst == 0 && i.offset == 0)?;
                if i.src == 1 { Ok(()) } else { Err("only functions of the program itself can be called") }
            }
            (op::EXIT, op::JMP) => zero(!register && i.dst == 0 && i.src == 0 && i.offset == 0 && i.imm == 0),
            (op::CALL | op::EXIT, _) => Err("no such jump"),
            (0x1..=0xd, _) => zero(if register { i.imm == 0 } else { i.src == 0 }),
            _ => Err("no such jump"),
        },
    }
}
