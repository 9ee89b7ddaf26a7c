//! A KVM machine: vCPUs, boot, buses, state units, API server

pub mod bus;
