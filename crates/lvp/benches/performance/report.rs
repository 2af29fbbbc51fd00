//! The numbers as text for a terminal. It leaves out the document.

use std::fmt::Write;

use serde_json::Value;

/// One case, as soon as it is measured.
pub fn group(group: &Value) -> String {
    let mut text = format!("\n{}\n", title(group));
    for (way, numbers) in group["ways"].as_object().into_iter().flatten() {
        let _ = write!(text, "  {way:<14} {} s", spread(&numbers["wall_s"]));
        if let Some(peak) = numbers["peak_mib"][2].as_f64() {
            let _ = write!(text, ", processors {} s, memory {peak:.0} MiB", spread(&numbers["processor_s"]));
        }
        text.push('\n');
    }
    for (name, key) in [("manual", "manual_parts_s"), ("alone", "alone_s")] {
        if let Some(parts) = group[key].as_object() {
            let parts: Vec<String> = parts.iter().map(|(part, value)| format!("{part} {value}")).collect();
            let _ = writeln!(text, "  {name}: {}", parts.join(", "));
        }
    }
    for ratio in group["ratios"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "  {}", line(ratio));
    }
    text
}

/// What a case is called.
pub fn title(group: &Value) -> String {
    let word = |key: &str| group[key].as_str().unwrap_or_default().to_owned();
    let stored = group["stored_mib"].as_u64().map(|mib| format!(", {mib} MiB stored")).unwrap_or_default();
    format!("{}: {} {} -> {}{stored}", word("case"), word("root"), word("image"), word("target"))
}

fn line(ratio: &Value) -> String {
    let word = |key: &str| ratio[key].as_str().unwrap_or_default();
    let against = if word("to").is_empty() { String::new() } else { format!(" / {}", word("to")) };
    let goal = match (ratio["goal"].as_f64(), ratio["met"].as_bool()) {
        (Some(goal), Some(true)) => format!("  goal {goal}: met"),
        (Some(goal), _) => format!("  goal {goal}: MISSED"),
        _ => String::new(),
    };
    format!("{}  {}{against}{goal}", spread(&ratio["ratio"]), word("what"))
}

/// Least, median, most.
pub fn spread(values: &Value) -> String {
    let value = |index: usize| values[index].as_f64().unwrap_or(f64::NAN);
    format!("{:6.2} {:6.2} {:6.2}", value(0), value(1), value(2))
}

/// All goals, met or not.
pub fn summary(all: &Value) -> String {
    let (mut met, mut missed) = (0, String::new());
    for group in all["groups"].as_array().into_iter().flatten() {
        for ratio in group["ratios"].as_array().into_iter().flatten() {
            match ratio["met"].as_bool() {
                Some(true) => met += 1,
                Some(false) => {
                    let _ = writeln!(missed, "  {}  [{}]", line(ratio), title(group));
                }
                None => {}
            }
        }
    }
    format!("least, median, most; {met} goals met\nnot met:\n{missed}")
}
