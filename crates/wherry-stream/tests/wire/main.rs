//! The wire as its users see it: both ends over real sockets, and peers that lie, stop, vanish or never answer.

#[cfg(test)]
mod common;
#[cfg(test)]
mod connection;
#[cfg(test)]
mod documented;
#[cfg(test)]
mod endpoint;
#[cfg(test)]
mod frames;
#[cfg(test)]
mod hello;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod seeds;
#[cfg(test)]
mod tls;
