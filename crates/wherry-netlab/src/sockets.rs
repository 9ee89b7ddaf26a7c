//! The TCP connections of another process, and how to end them under it: its own descriptor is duplicated and shut down.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{Shutdown, shutdown};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// An established TCP connection of a process.
#[derive(Debug)]
pub struct Connection {
    /// The lowest of the process's descriptors of it.
    pub fd: i32,
    /// Port at the process's end.
    pub port: u16,
    /// Port at the other end.
    pub peer_port: u16,
    socket: OwnedFd,
}

impl Connection {
    /// Ends it in both directions, as if both programs had: what was sent before still arrives.
    pub fn shut(&self) -> io::Result<()> {
        match shutdown(self.socket.as_fd(), Shutdown::Both) {
            // It has ended by itself.
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The established TCP connections (IPv4) of a process, in the order of their descriptors.
pub fn connections(pid: u32) -> io::Result<Vec<Connection>> {
    let process = Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
    let established: Vec<_> = table.lines().filter_map(established).collect();
    let mut fds: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/fd"))?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    fds.sort_unstable();
    let (mut found, mut known) = (Vec::new(), Vec::new());
    for fd in fds {
        // Descriptors may close while we look at them.
        let Ok(target) = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")) else { continue };
        let target = target.to_string_lossy();
        let inode = target.strip_prefix("socket:[").and_then(|t| t.strip_suffix(']')).and_then(|t| t.parse().ok());
        let Some((port, peer_port, inode)) = established.iter().find(|(.., at)| Some(*at) == inode) else { continue };
        if known.contains(inode) {
            continue;
        }
        if let Ok(socket) = pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()) {
            known.push(*inode);
            found.push(Connection { fd, port: *port, peer_port: *peer_port, socket });
        }
    }
    Ok(found)
}

/// Local port, port of the peer and inode in a line of `/proc/net/tcp` (proc_net_tcp.rst of the kernel), if it is of an established
/// connection.
fn established(line: &str) -> Option<(u16, u16, u64)> {
    const ESTABLISHED: &str = "01";
    let mut fields = line.split_whitespace();
    let (local, peer) = (fields.nth(1)?, fields.next()?);
    if fields.next()? != ESTABLISHED {
        return None;
    }
    let port = |address: &str| u16::from_str_radix(address.split_once(':')?.1, 16).ok();
    Some((port(local)?, port(peer)?, fields.nth(5)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernels_table_are_read() {
        let line = "   1: 0100007F:1F90 0100007F:D431 01 00000000:00000000 00:00000000 00000000  1000 0 4242 1 0 20 4 30 10 -1";
        assert_eq!(established(line), Some((8080, 54321, 4242)));
        assert_eq!(established(&line.replace(" 01 ", " 0A ")), None);
        assert_eq!(
            established("  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid"),
            None
        );
    }

    #[test]
    fn a_connection_is_found_and_ends_for_its_owner() {
        use std::io::Read;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let port = near.local_addr().unwrap().port();
        let all = connections(std::process::id()).unwrap();
        let ours: Vec<_> = all.iter().filter(|c| c.port == port).collect();
        assert_eq!(ours.len(), 1, "{all:?}");
        ours[0].shut().unwrap();
        far.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        assert_eq!(far.read(&mut [0; 1]).unwrap(), 0);
        drop(near);
    }
}
