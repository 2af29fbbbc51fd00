//! Holds the layer table at the head of `src/lib.rs`: a module imports only from lines of the table below its own.
//!
//! It reads the sources as text: every `crate::…` path outside comments. It leaves out test modules, which may stand on
//! anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The table: each module with the number of its line, counted from the bottom.
fn table() -> BTreeMap<String, usize> {
    let text = fs::read_to_string(source().join("lib.rs")).unwrap();
    let rows: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("//!  row ")).collect();
    let mut table = BTreeMap::new();
    for (height, row) in rows.iter().rev().enumerate() {
        // The number, the modules, and maybe words about them, two spaces or more apart.
        let modules = row.split("  ").map(str::trim).filter(|part| !part.is_empty()).nth(1).unwrap();
        for module in modules.split_whitespace() {
            assert!(table.insert(module.to_owned(), height).is_none(), "{module} stands twice in the table");
        }
    }
    table
}

/// Every source file with the module of the first level that it belongs to.
fn files() -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let mut folders = vec![source()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let inside = path.strip_prefix(source()).unwrap();
                let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
                found.push((module, path));
            }
        }
    }
    found
}

/// The code that is built into the product: no comments, nothing from a test module on.
fn product_code(path: &Path) -> String {
    let is_test = |part: &std::ffi::OsStr| part == "tests" || part == "tests.rs" || part == "conformance.rs";
    if path.strip_prefix(source()).unwrap().iter().any(is_test) {
        return String::new();
    }
    let text = fs::read_to_string(path).unwrap();
    let product = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    product.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The first parts of all `crate::…` paths.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(group) => found.extend(first_parts(group)),
            None => found.extend(first_word(rest)),
        }
    }
    found
}

fn first_word(text: &str) -> Option<String> {
    let word: String = text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!word.is_empty()).then_some(word)
}

/// The first words of a group's members: `a::{b, c}, d}` gives a and d.
fn first_parts(group: &str) -> Vec<String> {
    let (mut depth, mut member, mut members) = (1, String::new(), Vec::new());
    for letter in group.chars() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
        if depth == 1 && letter == ',' {
            members.push(std::mem::take(&mut member));
        } else {
            member.push(letter);
        }
    }
    members.push(member);
    members.iter().filter_map(|member| first_word(member)).collect()
}

#[test]
fn a_module_imports_only_from_below() {
    let table = table();
    assert!(table.len() > 10, "the table was not found: {table:?}");
    let mut wrong = Vec::new();
    let mut looked_at = 0;
    for (module, path) in files() {
        if module == "lib" {
            continue;
        }
        let height = *table.get(&module).unwrap_or_else(|| panic!("{module} is not in the table of lib.rs"));
        for import in imports(&product_code(&path)) {
            looked_at += 1;
            let allowed = import == module || table.get(&import).is_some_and(|other| *other < height);
            if !allowed {
                wrong.push(format!("{} imports {import}", path.strip_prefix(source()).unwrap().display()));
            }
        }
    }
    assert!(looked_at > 60, "only {looked_at} imports were found");
    assert!(wrong.is_empty(), "not below the importing module's line:\n{}", wrong.join("\n"));
}

#[test]
fn every_line_of_the_table_is_a_module() {
    let known: BTreeSet<String> = files().into_iter().map(|(module, _)| module).collect();
    for module in table().keys() {
        assert!(known.contains(module), "{module} stands in the table and is no module");
    }
}

#[test]
fn the_engine_knows_no_server_no_command_line_and_no_cluster() {
    let manifest = fs::read_to_string(source().with_file_name("Cargo.toml")).unwrap();
    for stranger in ["axum", "tonic", "clap", "kube", "hyper", "tower", "toml"] {
        let is_named = |line: &str| line.split(['.', ' ', '=', '-']).next() == Some(stranger);
        assert!(!manifest.lines().any(is_named), "lvp-engine depends on {stranger}");
    }
}

#[test]
fn every_form_of_an_import_is_read() {
    let code = "use crate::{\n    error::{Error, Result},\n    host::block,\n    task};\nlet x = crate::image::Reader;";
    assert_eq!(imports(code).into_iter().collect::<Vec<_>>(), ["error", "host", "image", "task"]);
}
