//! Points where tests break lvp on purpose: built in with the feature `faults` only, nothing at all without it.
//!
//! A point stands where a crash or an error would be most unwelcome: before and after what a step does, between the parts
//! of a publication, in the middle of a copy. What happens there is told by the environment at the start, as the `fail`
//! crate reads it: `FAILPOINTS='volume.created=return(kill);cache.published=1*return(error)'`.
//!
//! ```text
//!  return(kill)        SIGKILL to the own process
//!  return(error)       the point gives an error
//!  return(panic)       the point panics
//!  return(wait:PATH)   makes the file PATH, and goes on when somebody has removed it
//! ```
//! Threads that decode may open no file and send no signal, so a thread of its own does these things for all others. Every
//! point that is passed is logged once. It leaves out which points there are: the steps' are named after them
//! (`STEP.begin`, `STEP.end`, `undo.STEP.begin`, `undo.STEP.end`), the others stand where they are in the code.

#[cfg(not(feature = "faults"))]
pub use off::point;
#[cfg(feature = "faults")]
pub use on::point;

#[cfg(not(feature = "faults"))]
mod off {
    use crate::error::Result;

    /// A point of this name: nothing.
    #[expect(clippy::unnecessary_wraps, reason = "with the feature it gives errors")]
    pub fn point(_name: &str) -> Result<()> {
        Ok(())
    }
}

#[cfg(feature = "faults")]
mod on {
    use std::{
        collections::BTreeSet,
        fs,
        path::Path,
        sync::{OnceLock, mpsc},
        thread,
        time::Duration,
    };

    use lvp_api::ErrorCode;
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    use tokio::runtime::{Handle, RuntimeFlavor};

    use crate::error::{Error, Result};

    const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

    /// What the thread is asked, and where its answer goes.
    struct Passed {
        name: String,
        answer: mpsc::Sender<Answer>,
    }

    enum Answer {
        GoOn,
        Fail,
        Panic,
    }

    /// A point of this name. Blocks as long as it is told to wait.
    ///
    /// # Errors
    /// `input_output` when it is told to give an error.
    pub fn point(name: &str) -> Result<()> {
        let is_a_worker =
            Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread);
        // Whoever waits here must not keep the daemon from answering.
        match if is_a_worker { tokio::task::block_in_place(|| ask(name)) } else { ask(name) } {
            Answer::GoOn => Ok(()),
            Answer::Fail => Err(Error::new(ErrorCode::InputOutput, format!("a test made {name} fail"))),
            Answer::Panic => panic!("a test made {name} panic"),
        }
    }

    fn ask(name: &str) -> Answer {
        static POINTS: OnceLock<mpsc::Sender<Passed>> = OnceLock::new();
        let points = POINTS.get_or_init(|| {
            let (points, passed) = mpsc::channel();
            thread::spawn(move || serve(&passed));
            points
        });
        let (answer, answered) = mpsc::channel();
        points.send(Passed { name: name.to_owned(), answer }).expect("the thread of the points lives on");
        answered.recv().expect("the thread of the points answers")
    }

    fn serve(passed: &mpsc::Receiver<Passed>) {
        // What it configures lasts as long as it does.
        let _scenario = fail::FailScenario::setup();
        let mut known = BTreeSet::new();
        for Passed { name, answer } in passed {
            if known.insert(name.clone()) {
                tracing::info!(point = name, "a point is passed");
            }
            let told = told(&name);
            // Others are not held up by who waits.
            thread::spawn(move || answer.send(act(told.as_deref())));
        }
    }

    /// What is told to happen here.
    fn told(name: &str) -> Option<String> {
        fail::fail_point!(name, |argument| argument);
        None
    }

    fn act(told: Option<&str>) -> Answer {
        match told {
            None => Answer::GoOn,
            Some("error") => Answer::Fail,
            Some("panic") => Answer::Panic,
            Some("kill") => {
                kill(Pid::this(), Signal::SIGKILL).expect("a process may kill itself");
                Answer::GoOn
            }
            Some(other) => {
                let path = Path::new(other.strip_prefix("wait:").expect("error, panic, kill or wait:PATH"));
                fs::write(path, "").expect("the file to wait for can be made");
                while path.exists() {
                    thread::sleep(BETWEEN_LOOKS);
                }
                Answer::GoOn
            }
        }
    }
}
