//! The probe guest: fills RAM with data, dirties it, verifies it, and reports. See docs/probe-guest.md.
//!
//! `guest_main` is entered by every vCPU. The first one reads the parameters, lays the data set out and starts the
//! others; then all do the same work (`worker`), each on its own slice of the data set.
#![no_std]
#![no_main]
#![warn(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

mod accel;
mod canary;
mod disk;
mod edu;
mod handed;
mod net;
mod setup;
mod testdma;
mod worker;

use wherry_guest_kernel::fault::{cpu_page, set_phase};
use wherry_guest_kernel::interrupt;
use wherry_guest_kernel::report::Phase;

use core::sync::atomic::Ordering::Relaxed;

#[unsafe(no_mangle)]
extern "C" fn guest_main(cpu: usize) -> ! {
    if cpu == 0 {
        setup::first();
    }
    cpu_page(cpu).apic_id.store(interrupt::local_apic_id(), Relaxed);
    set_phase(cpu, Phase::Booting);
    if cpu == 0 {
        setup::start_others();
    }
    worker::Worker::new(cpu, setup::get()).run()
}
