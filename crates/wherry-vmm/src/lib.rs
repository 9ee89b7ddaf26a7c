//! A KVM machine: vCPUs, boot, buses, state units, API server

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod api;
pub mod service;
pub mod layout;
pub mod line;
pub mod pci;
pub mod power;
