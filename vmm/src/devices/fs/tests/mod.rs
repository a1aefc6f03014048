//! Tests of the file server: its operations on real file systems (tmpfs, overlay), as a guest's
//! kernel would ask for them. They need root, because serving files of any owner does.

mod attributes;
mod bounds;
mod data;
mod directories;
mod escape;
mod exports;
mod guest;
mod messages;
mod model;
mod nodes;
mod overlay;
mod persist;
mod place;
mod xattrs;
