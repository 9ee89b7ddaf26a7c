//! A small state of a device as bytes that are checked when they are loaded: its kind, its length and a sum, in front of it. A state that was
//! cut, doubled, mixed up or made up is refused.

use rustix::io::Errno;

/// Kind, length, sum.
const HEAD: usize = 16;
const MAGIC: [u8; 4] = *b"WVU1";

/// A state that is being read or written, piece by piece.
#[derive(Debug, Default)]
pub struct Image {
    bytes: Vec<u8>,
    at: usize,
}

impl Image {
    /// To be read: this state.
    pub fn of(state: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(HEAD + state.len());
        bytes.extend(MAGIC);
        bytes.extend((state.len() as u64).to_le_bytes());
        bytes.extend(crc32c::crc32c(state).to_le_bytes());
        bytes.extend(state);
        Self { bytes, at: 0 }
    }

    /// The next bytes; how many there were.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let rest = &self.bytes[self.at..];
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        count
    }

    /// Bytes that are left to read.
    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Takes more bytes; no more than of a state of so many.
    pub fn write(&mut self, data: &[u8], most: usize) -> Result<(), Errno> {
        let room = (HEAD + most + 1).saturating_sub(self.bytes.len());
        self.bytes.extend(&data[..data.len().min(room)]);
        // The first byte that is wrong is enough.
        let known = self.bytes.len().min(MAGIC.len());
        if self.bytes.len() > HEAD + most || self.bytes[..known] != MAGIC[..known] {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// The state, if it is whole.
    pub fn finish(&mut self) -> Result<Vec<u8>, Errno> {
        let bytes = std::mem::take(&mut self.bytes);
        self.at = 0;
        let (head, state) = bytes.split_at_checked(HEAD).ok_or(Errno::INVAL)?;
        let mut expected = MAGIC.to_vec();
        expected.extend((state.len() as u64).to_le_bytes());
        expected.extend(crc32c::crc32c(state).to_le_bytes());
        match head == expected {
            true => Ok(state.to_vec()),
            false => Err(Errno::INVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Image;

    fn written(bytes: &[u8]) -> Result<Vec<u8>, rustix::io::Errno> {
        let mut image = Image::default();
        for piece in bytes.chunks(7) {
            image.write(piece, 64)?;
        }
        image.finish()
    }

    #[test]
    fn a_state_is_what_it_was_and_nothing_else_is_one() {
        let mut whole = vec![0; 100];
        let count = Image::of(b"twelve bytes").read(&mut whole);
        whole.truncate(count);
        assert_eq!(written(&whole).unwrap(), b"twelve bytes");
        for cut in 0..whole.len() {
            assert!(written(&whole[..cut]).is_err(), "cut to {cut}");
        }
        assert!(written(&[whole.clone(), whole.clone()].concat()).is_err());
        for at in 0..whole.len() {
            let mut wrong = whole.clone();
            wrong[at] ^= 1;
            assert!(written(&wrong).is_err(), "byte {at}");
        }
    }

    #[test]
    fn no_more_is_taken_than_there_may_be() {
        let mut image = Image::default();
        assert!(image.write(&[b"WVU1".to_vec(), vec![0; 1000]].concat(), 64).is_err());
        assert!(image.bytes.len() <= 16 + 64 + 1);
        assert!(image.write(&[0; 1000], 64).is_err());
        assert!(image.bytes.len() <= 16 + 64 + 1);
    }
}
