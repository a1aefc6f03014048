//! The reading end of a FIFO that a shim writes to. A thread opens it, which waits for the writer, and reads to its end.

use std::{
    fs::{self, OpenOptions},
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::mpsc::{self, Receiver},
    thread,
    time::Instant,
};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::failure::Failure;

/// What one read takes at most.
const CHUNK: usize = 64 << 10;

/// A FIFO and what was read from it.
pub struct Fifo {
    path: PathBuf,
    chunks: Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl Fifo {
    /// Makes it and begins to read.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make(path: PathBuf) -> Result<Self, Failure> {
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        let (sender, chunks) = mpsc::channel();
        let from = path.clone();
        thread::spawn(move || {
            let Ok(mut file) = fs::File::open(from) else {
                return;
            };
            let mut chunk = vec![0; CHUNK];
            while let Ok(length @ 1..) = file.read(&mut chunk) {
                if sender.send(chunk[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            path,
            chunks,
            seen: Vec::new(),
        })
    }

    /// Its name.
    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// Waits until `text` has come.
    ///
    /// # Errors
    /// The stream or the time ends before.
    pub fn until(&mut self, text: &str, deadline: Instant) -> Result<(), Failure> {
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.chunks.recv_timeout(left) {
                Ok(chunk) => self.seen.extend(chunk),
                Err(error) => {
                    let path = self.path.display();
                    return Err(Failure::new(format!("{path}: no '{text}': {error}")));
                }
            }
        }
        Ok(())
    }

    /// Waits until the last writer has closed it; gives everything that came.
    ///
    /// # Errors
    /// The time ends before.
    pub fn to_end(&mut self, deadline: Instant) -> Result<Vec<u8>, Failure> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.chunks.recv_timeout(left) {
                Ok(chunk) => self.seen.extend(chunk),
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(self.seen.clone()),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(Failure::new(format!(
                        "{} has no end, {} bytes came",
                        self.path.display(),
                        self.seen.len()
                    )));
                }
            }
        }
    }

    /// What has come up to now.
    pub fn text(&mut self) -> String {
        self.seen.extend(self.chunks.try_iter().flatten());
        String::from_utf8_lossy(&self.seen).into_owned()
    }
}

impl Drop for Fifo {
    /// The thread may still wait for a writer that never came.
    fn drop(&mut self) {
        let flags = rustix::fs::OFlags::NONBLOCK.bits();
        let _ = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.cast_signed())
            .open(&self.path);
    }
}
