//! The table of docs/fork-correctness.md against the tree: each row has a policy, code that is there and a test that is
//! there.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use forkvm_tests::table;

const HEADER: &str = "| what is copied | policy | code | test |";

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The words between backticks.
fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Whether a test's name is that of a case of the table, or `FILE::FUNCTION` with that function in the file.
fn is_test(name: &str, cases: &BTreeSet<String>) -> bool {
    match name.split_once("::") {
        None => cases.contains(name),
        Some((file, function)) => fs::read_to_string(top().join(file))
            .is_ok_and(|text| text.contains(&format!("fn {function}("))),
    }
}

#[test]
fn each_row_has_its_policy_its_code_and_its_test() {
    let page = fs::read_to_string(top().join("docs/fork-correctness.md")).unwrap();
    let rows: Vec<&str> = page
        .lines()
        .skip_while(|line| *line != HEADER)
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .collect();
    assert!(rows.len() > 15, "only {} rows were found", rows.len());
    let cases: BTreeSet<String> = table::cases()
        .iter()
        .map(|case| case.name().to_owned())
        .collect();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [what, policy, code, test] = cells.as_slice() else {
            panic!("not four cells: {row}");
        };
        assert!(!what.is_empty() && !policy.is_empty(), "{row}");
        let (code, tests) = (names(code), names(test));
        assert!(!code.is_empty(), "no code: {what}");
        for path in code {
            assert!(top().join(path).exists(), "{what}: there is no {path}");
        }
        assert!(!tests.is_empty(), "no test: {what}");
        for test in tests {
            assert!(is_test(test, &cases), "{what}: there is no test {test}");
        }
    }
}

/// Every case about what children share is run with one vCPU and with several.
#[test]
fn each_case_of_two_children_is_run_with_several_vcpus() {
    let names: Vec<String> = table::cases()
        .iter()
        .map(|case| case.name().to_owned())
        .filter(|name| name.starts_with("identity/"))
        .collect();
    let (many, plain): (Vec<&String>, Vec<&String>) = names
        .iter()
        .partition(|name| name.ends_with("-with-4-vcpus"));
    for name in plain {
        // It looks into a file, and starts no children.
        if name == "identity/no-secret-in-a-template" {
            continue;
        }
        let with_many = format!("{name}-with-4-vcpus");
        assert!(many.contains(&&with_many), "there is no {with_many}");
    }
}
