//! What a processor is worth, here and in a guest: the same three loops in both. A reader of a
//! report sees by them what is forkvm's and what is the machine's.

use std::{
    hint::black_box,
    ptr,
    time::{Duration, Instant},
};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use serde::{Deserialize, Serialize};

use super::Error;

const TURNS: u32 = 2_000_000;
const PAGES: usize = 2048;
const PAGE: usize = 4096;
const CALLS: u32 = 20_000;

/// Nanoseconds of one turn of each loop.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Ten turns of an xorshift generator in registers.
    pub cpu_ns: f64,
    /// The first write to a page of anonymous memory.
    pub page_fault_ns: f64,
    /// A system call that does nothing (`getppid`).
    pub system_call_ns: f64,
}

impl Calibration {
    /// Runs the loops.
    ///
    /// # Errors
    /// When the memory of the second loop cannot be had.
    pub fn take() -> Result<Self, Error> {
        // Once for the caches, once for the figure.
        page_faults()?;
        Ok(Calibration {
            cpu_ns: per_turn(cpu(), f64::from(TURNS)),
            page_fault_ns: per_turn(page_faults()?, PAGES as f64),
            system_call_ns: per_turn(system_calls(), f64::from(CALLS)),
        })
    }
}

fn per_turn(time: Duration, turns: f64) -> f64 {
    time.as_secs_f64() * 1e9 / turns
}

fn cpu() -> Duration {
    let began = Instant::now();
    let mut state = black_box(0x9e37_79b9_7f4a_7c15_u64);
    for _ in 0..TURNS {
        for _ in 0..10 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
    }
    black_box(state);
    began.elapsed()
}

fn page_faults() -> Result<Duration, Error> {
    let failed = |error: rustix::io::Errno| Error::new(format!("memory to calibrate: {error}"));
    let length = PAGES * PAGE;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches no memory that
    // exists; a Vec would reuse pages that are there already.
    let memory = unsafe { mmap_anonymous(ptr::null_mut(), length, protection, MapFlags::PRIVATE) }
        .map_err(failed)?;
    // SAFETY: the range is the mapping made above. With huge pages one fault would bring in 512.
    unsafe { madvise(memory, length, Advice::LinuxNoHugepage) }.map_err(failed)?;
    let began = Instant::now();
    for page in 0..PAGES {
        let byte = memory.cast::<u8>().wrapping_add(page * PAGE);
        // SAFETY: `page * PAGE` is inside the mapping, which is writable and nobody else's.
        unsafe { byte.write_volatile(1) };
    }
    let took = began.elapsed();
    // SAFETY: nothing refers to the mapping any more.
    unsafe { munmap(memory, length) }.map_err(failed)?;
    Ok(took)
}

fn system_calls() -> Duration {
    let began = Instant::now();
    for _ in 0..CALLS {
        black_box(rustix::process::getppid());
    }
    began.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_loop_takes_time() {
        let taken = Calibration::take().unwrap();
        assert!(taken.cpu_ns > 1.0, "{taken:?}");
        assert!(taken.page_fault_ns > 10.0, "{taken:?}");
        assert!(taken.system_call_ns > 10.0, "{taken:?}");
    }
}
