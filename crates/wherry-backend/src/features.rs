//! Features that a back end knows, beside those of its device.

/// Features of the transport and of the protocol: logging, the protocol's own, virtio 1.
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const VERSION_1: u64 = 1 << 32;

/// Features of the protocol (bits).
pub(crate) mod protocol {
    pub(crate) const MQ: u64 = 1 << 0;
    pub(crate) const LOG_SHMFD: u64 = 1 << 1;
    pub(crate) const RARP: u64 = 1 << 2;
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    pub(crate) const PAGEFAULT: u64 = 1 << 8;
    pub(crate) const CONFIG: u64 = 1 << 9;
    pub(crate) const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub(crate) const RESET_DEVICE: u64 = 1 << 13;
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub(crate) const DEVICE_STATE: u64 = 1 << 19;
    pub(crate) const ALL: u64 = MQ
        | LOG_SHMFD
        | RARP
        | REPLY_ACK
        | BACKEND_REQ
        | PAGEFAULT
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | DEVICE_STATE;
}
