//! Has the agent of the guest linked so that its text and its constants can be mapped as huge pages. Built for anything else, its
//! tests say, it is linked like any program.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=huge_pages.ld");
    let features = env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    let folder = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    if features.split(',').any(|feature| feature == "crt-static") {
        // Each segment on huge pages of its own.
        println!("cargo:rustc-link-arg-bins=-Wl,-z,max-page-size=0x200000");
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{folder}/huge_pages.ld");
    }
}
