//! A KVM machine: vCPUs, boot, buses, state units, API server.
//!
//! - [`vm`]: the machine, made from a [`config`] and driven; [`builder`] makes the one that arrives, from a
//!   [`description`].
//! - `vcpu`, [`cpu_model`], [`units`], `dirty_log`: KVM's side of it.
//! - [`boot`], [`mod@line`], [`layout`], [`acpi`], [`pci`], [`hotplug`], [`power`], [`rtc`], [`serial`]: the platform the guest sees.
//! - [`update`]: hands the machine over to a new process, or takes it over from an old one.
//! - [`service`], [`api`]: where a process knows where its VM stands, and how others ask.

pub mod acpi;
pub mod api;
pub mod boot;
pub mod builder;
pub mod config;
pub mod cpu_model;
pub mod description;
mod dirty_log;
#[cfg(test)]
mod golden;
pub mod hotplug;
pub mod layout;
pub mod line;
pub mod pci;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod service;
pub mod units;
pub mod update;
mod vcpu;
pub mod vm;
