//! Links the shim at a fixed address where it is linked statically.
//!
//! containerd executes it three times for each container. A program that may lie anywhere first writes its 20,000 addresses anew,
//! a millisecond each time, a third of what such an execution takes. Stack, heap and mappings lie at random as before; the monitor,
//! which is what a guest can attack, stays position-independent.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let features = std::env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    if features.split(',').any(|feature| feature == "crt-static") {
        // Behind rustc's own `-static-pie`, which the former takes back.
        println!("cargo::rustc-link-arg-bins=-no-pie");
        println!("cargo::rustc-link-arg-bins=-static");
    }
}
