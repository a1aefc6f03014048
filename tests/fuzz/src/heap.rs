//! A bound on what a target allocates: this crate's allocator counts what each thread holds.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes that this thread has allocated less those that it has freed.
    static HELD: Cell<isize> = const { Cell::new(0) };
    /// The most since [`bounded`] began.
    static MOST: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    // A thread that ends frees what it holds after its counters are gone.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: unsafe because memory must be as asked for: all of it is the system allocator's, and the
// counters are thread-local numbers that allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size.cast_signed() - layout.size().cast_signed());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Runs `work` in this thread and asserts that it never held more than `limit` bytes at a time.
pub fn bounded<T>(limit: usize, work: impl FnOnce() -> T) -> T {
    let before = HELD.get();
    MOST.set(before);
    let result = work();
    let most = MOST.get() - before;
    assert!(
        most <= limit.cast_signed(),
        "{most} bytes were allocated at a time, the bound is {limit}"
    );
    result
}

#[cfg(test)]
mod tests {
    #[test]
    #[should_panic(expected = "the bound is 1000")]
    fn more_than_the_bound_is_found() {
        super::bounded(1000, || drop(vec![0_u8; 1001]));
    }

    #[test]
    fn what_is_freed_does_not_count() {
        super::bounded(1500, || (0..10).for_each(|_| drop(vec![0_u8; 1000])));
    }
}
