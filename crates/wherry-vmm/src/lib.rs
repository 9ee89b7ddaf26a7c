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
pub mod builder;
pub mod config;
pub mod cpu_model;
pub mod description;
mod dirty_log;
pub mod units;
mod vcpu;
pub mod vm;
pub mod serial;
