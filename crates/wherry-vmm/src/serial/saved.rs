//! What the unit `serial` saves.

use vm_superio::SerialState;
use wherry_state::SavedState;

/// Schema 1: the registers of the chip. Schema 2: in a live update, what is on its way between the chip and the outside.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct SavedSerial {
    /// Divisor latch, both bytes.
    #[prost(uint32, tag = "1")]
    pub divisor: u32,
    /// Interrupt enable register.
    #[prost(uint32, tag = "2")]
    pub interrupt_enable: u32,
    /// Interrupt identification register: what is pending.
    #[prost(uint32, tag = "3")]
    pub interrupt_identification: u32,
    /// Line control register.
    #[prost(uint32, tag = "4")]
    pub line_control: u32,
    /// Line status register.
    #[prost(uint32, tag = "5")]
    pub line_status: u32,
    /// Modem control register.
    #[prost(uint32, tag = "6")]
    pub modem_control: u32,
    /// Modem status register.
    #[prost(uint32, tag = "7")]
    pub modem_status: u32,
    /// Scratch register.
    #[prost(uint32, tag = "8")]
    pub scratch: u32,
    /// What was received and not yet read.
    #[prost(bytes = "vec", tag = "9")]
    pub received: Vec<u8>,
    /// Read from outside, not yet taken by the chip.
    #[prost(bytes = "vec", tag = "10")]
    pub waiting_input: Vec<u8>,
    /// Sent by the guest, not yet taken by the outside.
    #[prost(bytes = "vec", tag = "11")]
    pub waiting_output: Vec<u8>,
    /// At a terminal, the first half of a way out (Ctrl-A) was typed. Who does not know it has it typed again.
    #[prost(bool, tag = "12")]
    pub escaping: bool,
}

impl SavedState for SavedSerial {
    const SCHEMA: u32 = 2;
}

impl SavedSerial {
    pub fn of(state: &SerialState) -> Self {
        Self {
            divisor: u16::from_le_bytes([state.baud_divisor_low, state.baud_divisor_high]).into(),
            interrupt_enable: state.interrupt_enable.into(),
            interrupt_identification: state.interrupt_identification.into(),
            line_control: state.line_control.into(),
            line_status: state.line_status.into(),
            modem_control: state.modem_control.into(),
            modem_status: state.modem_status.into(),
            scratch: state.scratch.into(),
            received: state.in_buffer.clone(),
            ..Self::default()
        }
    }

    pub fn to_state(&self) -> Result<SerialState, String> {
        let byte =
            |what: &str, value: u32| u8::try_from(value).map_err(|_| format!("{what} {value:#x} has more than 8 bits"));
        let divisor = u16::try_from(self.divisor).map_err(|_| format!("divisor {} is impossible", self.divisor))?;
        let [baud_divisor_low, baud_divisor_high] = divisor.to_le_bytes();
        Ok(SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: byte("interrupt enable", self.interrupt_enable)?,
            interrupt_identification: byte("interrupt identification", self.interrupt_identification)?,
            line_control: byte("line control", self.line_control)?,
            line_status: byte("line status", self.line_status)?,
            modem_control: byte("modem control", self.modem_control)?,
            modem_status: byte("modem status", self.modem_status)?,
            scratch: byte("scratch", self.scratch)?,
            in_buffer: self.received.clone(),
        })
    }
}
