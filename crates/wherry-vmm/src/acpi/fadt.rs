//! FADT (section 5.2.9): the fixed registers.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM, OEM_REVISION, OEM_TABLE, RTC_CENTURY, SCI};
use crate::{hotplug, power};

/// There is no VGA to probe for, and no link to save power on.
const BOOT_VGA_NOT_PRESENT: u16 = 1 << 2;
const BOOT_NO_ASPM: u16 = 1 << 4;
/// Latencies above these mean that the CPU states C2 and C3 do not exist.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

fn ports(first: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, first.into())
}

pub(super) fn fadt(facs: u64, dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        // The power button is in the fixed registers; there is no sleep button, and no wake-up by the clock.
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    // Both are below 1 MiB. For the FACS one of the two fields must be 0.
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (SCI as u16).into();
    fadt.pm1a_evt_blk = u32::from(power::PM1_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = ports(power::PM1_EVENT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(power::PM1_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = ports(power::PM1_CONTROL, 16, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(power::PM_TIMER).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = ports(power::PM_TIMER, 32, AccessSize::DwordAccess);
    fadt.gpe0_blk = u32::from(hotplug::GPE0).into();
    fadt.gpe0_blk_len = 2;
    fadt.x_gpe0_blk = ports(hotplug::GPE0, 16, AccessSize::ByteAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = RTC_CENTURY;
    fadt.iapc_boot_arch = (BOOT_VGA_NOT_PRESENT | BOOT_NO_ASPM).into();
    fadt.reset_reg = ports(power::RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = power::RESET_VALUE;
    fadt.finalize()
}
