//! The wire: handshake, frames and channels; knows no VM
