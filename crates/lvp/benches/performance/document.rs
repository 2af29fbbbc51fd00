//! The numbers as the tables of `docs/reference/performance.md`. It leaves out what the document says about them.

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::Value;

/// Between these two lines of the document stands what is generated.
const BEGIN: &str = "<!-- generated: make bench-document -->\n";
const END: &str = "<!-- end of what is generated -->\n";

/// Puts the tables of a result into the document.
pub fn write(result: &Path) -> Result<()> {
    let text = fs::read_to_string(result).with_context(|| format!("{}: run `make bench` first", result.display()))?;
    let all: Value = serde_json::from_str(&text)?;
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/performance.md");
    let before = fs::read_to_string(&document)?;
    let (head, rest) = before.split_once(BEGIN).context("the document has no first mark")?;
    let (_, tail) = rest.split_once(END).context("the document has no last mark")?;
    fs::write(&document, format!("{head}{BEGIN}\n{}\n{END}{tail}", tables(&all)))?;
    println!("written to {}", PathBuf::from("docs/reference/performance.md").display());
    Ok(())
}

fn tables(all: &Value) -> String {
    [machine(all), goals(all), seconds(all), limits(all)].join("\n")
}

fn groups<'a>(all: &'a Value, case: &'a str) -> impl Iterator<Item = &'a Value> {
    all["groups"].as_array().into_iter().flatten().filter(move |group| case.is_empty() || group["case"] == case)
}

fn word<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn machine(all: &Value) -> String {
    let machine = &all["machine"];
    let yes = |key: &str| if machine[key] == true { "yes" } else { "no" };
    format!(
        "Measured on {} × {}, SHA instructions: {}, AVX-512: {}, {} of memory, Linux {}, {}, curl {}. Load before \
         {}, after {}.\n",
        machine["processors"],
        word(machine, "processor"),
        yes("sha_instructions"),
        yes("avx512"),
        word(machine, "memory"),
        word(machine, "kernel"),
        word(machine, "qemu_img"),
        word(machine, "curl"),
        word(machine, "load_before"),
        word(all, "load_after"),
    )
}

fn goals(all: &Value) -> String {
    let mut text = String::from("| what | against | image | target | least | median | most | goal | |\n");
    text.push_str("|---|---|---|---|---|---|---|---|---|\n");
    for group in groups(all, "") {
        for ratio in group["ratios"].as_array().into_iter().flatten() {
            let verdict = match ratio["met"].as_bool() {
                Some(true) => "met",
                Some(false) => "**missed**",
                None => "",
            };
            let goal = ratio["goal"].as_f64().map(|goal| format!("≤ {goal}")).unwrap_or_default();
            let value = |index: usize| ratio["ratio"][index].as_f64().unwrap_or(f64::NAN);
            let _ = writeln!(
                text,
                "| {} | {} | {} {} | {} | {:.2} | {:.2} | {:.2} | {goal} | {verdict} |",
                word(ratio, "what"),
                word(ratio, "to"),
                word(group, "root"),
                word(group, "image"),
                word(group, "target"),
                value(0),
                value(1),
                value(2),
            );
        }
    }
    text
}

fn seconds(all: &Value) -> String {
    let mut text =
        String::from("Seconds by the clock (least, median, most), seconds of processors and largest memory:\n\n");
    text.push_str(
        "| image | target | way | least | median | most | processors | MiB |\n|---|---|---|---|---|---|---|---|\n",
    );
    for group in groups(all, "") {
        for (way, numbers) in group["ways"].as_object().into_iter().flatten() {
            let wall = |index: usize| numbers["wall_s"][index].as_f64().unwrap_or(f64::NAN);
            // What runs in the test machine is not measured so.
            let processors =
                numbers["processor_s"][1].as_f64().map(|seconds| format!("{seconds:.2}")).unwrap_or_default();
            let peak = numbers["peak_mib"][2].as_f64().map(|mib| format!("{mib:.0}")).unwrap_or_default();
            let _ = writeln!(
                text,
                "| {} {} | {} | {way} | {:.2} | {:.2} | {:.2} | {processors} | {peak} |",
                word(group, "root"),
                word(group, "image"),
                word(group, "target"),
                wall(0),
                wall(1),
                wall(2),
            );
        }
    }
    text
}

fn limits(all: &Value) -> String {
    let mut text =
        String::from("The stages of a miss, each alone, in seconds; no way can be faster than the slowest:\n\n");
    text.push_str("| image | target | download | hash | decode, on all processors | write | slowest | lvp |\n");
    text.push_str("|---|---|---|---|---|---|---|---|\n");
    for group in groups(all, "provision") {
        let alone = |key: &str| group["alone_s"][key].as_f64().unwrap_or(f64::NAN);
        let _ = writeln!(
            text,
            "| {} {} | {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
            word(group, "root"),
            word(group, "image"),
            word(group, "target"),
            alone("download"),
            alone("hash"),
            alone("decode_on_all"),
            alone("write"),
            alone("slowest"),
            group["ways"]["lvp, miss"]["wall_s"][1].as_f64().unwrap_or(f64::NAN),
        );
    }
    text
}
