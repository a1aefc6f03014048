use super::*;

#[test]
fn placeholder_until_filled() {
    assert!(check_id("a").is_ok());
}
