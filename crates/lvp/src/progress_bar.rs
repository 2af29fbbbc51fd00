//! A job's progress while it runs: a bar per stage on a terminal, plain lines otherwise. To stderr, so that stdout has
//! the result only.

use std::{io::IsTerminal, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use lvp_api::{ByteSize, Job, Stage};

/// A plain line is printed when this many percent were done since the last.
const LINE_EVERY: u8 = 10;

/// Shows one job.
pub enum ProgressDisplay {
    /// On a terminal.
    Bar {
        /// The stage that the bar is of, and the bar.
        current: Option<(Stage, ProgressBar)>,
    },
    /// Into a file or a pipe.
    Lines {
        /// What was printed last.
        last: Option<(Stage, u8)>,
    },
    /// Not at all.
    Silent,
}

impl ProgressDisplay {
    /// For this process's stderr; `quiet`: not at all.
    pub fn new(quiet: bool) -> Self {
        if quiet {
            Self::Silent
        } else if std::io::stderr().is_terminal() {
            Self::Bar { current: None }
        } else {
            Self::Lines { last: None }
        }
    }

    /// Shows how far the job is.
    pub fn show(&mut self, job: &Job) {
        if job.status.is_terminal() {
            return self.finish();
        }
        match self {
            Self::Silent => {}
            Self::Bar { current } => show_bar(current, job),
            Self::Lines { last } => show_line(last, job),
        }
    }

    /// Ends the display.
    pub fn finish(&mut self) {
        if let Self::Bar { current } = self
            && let Some((_, bar)) = current.take()
        {
            bar.finish_and_clear();
        }
    }
}

fn words(stage: Stage) -> &'static str {
    match stage {
        Stage::Queued => "waiting",
        Stage::Downloading => "downloading",
        Stage::Verifying => "verifying",
        Stage::CreatingVolume => "creating volume",
        Stage::Populating => "populating",
        Stage::Finalizing => "finalizing",
    }
}

fn show_bar(current: &mut Option<(Stage, ProgressBar)>, job: &Job) {
    let progress = &job.progress;
    if current.as_ref().is_none_or(|(stage, _)| *stage != progress.stage) {
        if let Some((stage, bar)) = current.take() {
            bar.finish_and_clear();
            if stage != Stage::Queued {
                bar.println(format!("✓ {}", words(stage)));
            }
        }
        let bar = ProgressBar::new(progress.bytes_total);
        bar.enable_steady_tick(Duration::from_millis(100));
        bar.set_prefix(words(progress.stage));
        *current = Some((progress.stage, bar));
    }
    let Some((_, bar)) = current else { return };
    let template = if progress.bytes_total > 0 {
        "{spinner} {prefix:<16} {bar:30} {percent:>3}%  {bytes} of {total_bytes}  {msg}"
    } else {
        "{spinner} {prefix:<16} {msg}"
    };
    bar.set_style(ProgressStyle::with_template(template).expect("a template").progress_chars("━╸ "));
    bar.set_length(progress.bytes_total);
    bar.set_position(progress.bytes_processed);
    bar.set_message(rate(job));
}

fn show_line(last: &mut Option<(Stage, u8)>, job: &Job) {
    let progress = &job.progress;
    let due = last.is_none_or(|(stage, percent)| {
        stage != progress.stage || progress.percent >= percent.saturating_add(LINE_EVERY)
    });
    if !due {
        return;
    }
    *last = Some((progress.stage, progress.percent));
    let bytes = if progress.bytes_total > 0 {
        format!("  {} of {}", ByteSize(progress.bytes_processed), ByteSize(progress.bytes_total))
    } else {
        String::new()
    };
    eprintln!(
        "{:>3}%  {}{bytes}{}",
        progress.percent,
        words(progress.stage),
        Some(rate(job)).filter(|rate| !rate.is_empty()).map(|rate| format!("  {rate}")).unwrap_or_default()
    );
}

fn rate(job: &Job) -> String {
    let Some(rate) = job.progress.bytes_per_second else { return String::new() };
    let left = job.progress.seconds_left.map(|seconds| format!(", {seconds} s left")).unwrap_or_default();
    format!("{}/s{left}", ByteSize(rate))
}
