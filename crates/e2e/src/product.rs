//! `lvp serve` in the test machine, and its HTTP API as a user of curl sees it.
//!
//! It knows paths and JSON, none of lvp's types. It leaves out what an answer ought to be.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use xtask::{boot::SERVICE, process};

use crate::{
    bed::BINARY,
    vm::{Process, Response, Vm},
};

/// How long it may take to come up.
const START: Duration = Duration::from_secs(60);
/// How long a provision may take.
const JOB: Duration = Duration::from_secs(300);
/// How long to leave it alone between two looks at a job.
const POLL: Duration = Duration::from_millis(50);

/// A running daemon. Dropping it kills it; its state and cache stay until the scenario ends.
pub struct Product<'vm> {
    /// Its process: `kill_9`, `stop`, `log`, `id`.
    pub process: Process<'vm>,
    vm: &'vm Vm,
}

impl<'vm> Product<'vm> {
    /// Starts `lvp serve` with this environment, whose port is 8080, and waits until it answers.
    ///
    /// # Errors
    /// It ends, or does not answer; the error quotes its log.
    pub fn start(vm: &'vm Vm, name: &str, environment: &[(String, String)]) -> Result<Self> {
        Self::start_program(vm, name, environment, BINARY)
    }

    /// As [`Product::start`], by this binary.
    ///
    /// # Errors
    /// As [`Product::start`].
    pub fn start_program(vm: &'vm Vm, name: &str, environment: &[(String, String)], program: &str) -> Result<Self> {
        let process = vm.spawn(name, environment, &[program, "serve"])?;
        let product = Self { process, vm };
        product.wait_until_alive()?;
        Ok(product)
    }

    /// Starts it again, with the same environment, state and cache, after it was killed or stopped.
    ///
    /// # Errors
    /// As [`Product::start`]; or it runs.
    pub fn start_again(&self) -> Result<()> {
        self.process.start_again()?;
        self.wait_until_alive()
    }

    fn wait_until_alive(&self) -> Result<()> {
        let answer = process::until(START, || match self.get("/livez") {
            Ok(response) => (response.status == 200).then_some(true),
            Err(_) => (!self.process.is_running().unwrap_or(true)).then_some(false),
        });
        ensure!(answer == Some(true), "lvp serve did not come up; its log:\n{}", self.process.log()?);
        Ok(())
    }

    /// GET of a path.
    ///
    /// # Errors
    /// There is no answer.
    pub fn get(&self, path: &str) -> Result<Response> {
        self.vm.ask("GET", path, None)
    }

    /// POST of JSON to a path.
    ///
    /// # Errors
    /// There is no answer.
    pub fn post(&self, path: &str, body: &Value) -> Result<Response> {
        self.vm.ask("POST", path, Some(&body.to_string()))
    }

    /// DELETE of a path.
    ///
    /// # Errors
    /// There is no answer.
    pub fn delete(&self, path: &str) -> Result<Response> {
        self.vm.ask("DELETE", path, None)
    }

    /// The URL of a path, in the machine.
    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{SERVICE}{path}")
    }

    /// Asks for a provision that must be accepted, and returns the job's id.
    ///
    /// # Errors
    /// It is not accepted with 202 and a `job_id`.
    pub fn provision(&self, request: &Value) -> Result<String> {
        let response = self.post("/api/v1/provision", request)?;
        ensure!(response.status == 202, "not accepted: {} {}", response.status, response.body);
        Ok(response.json()?["job_id"].as_str().context("no job_id")?.to_owned())
    }

    /// A job as the API shows it.
    ///
    /// # Errors
    /// It is not there.
    pub fn job(&self, id: &str) -> Result<Value> {
        let response = self.get(&format!("/api/v1/jobs/{id}"))?;
        ensure!(response.status == 200, "job {id}: {} {}", response.status, response.body);
        response.json()
    }

    /// Waits until a job satisfies `condition`, `limit` at most, and returns it.
    ///
    /// # Errors
    /// It does not, or ended (completed, failed, cancelled) without.
    pub fn job_when(&self, id: &str, limit: Duration, condition: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let job = self.job(id)?;
            if condition(&job) {
                return Ok(job);
            }
            if ended(&job) || Instant::now() >= deadline {
                bail!("job {id} did not get there: {job:#}");
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until a job has ended, however it did, and returns it.
    ///
    /// # Errors
    /// It has not ended within `limit`.
    pub fn job_ended(&self, id: &str, limit: Duration) -> Result<Value> {
        self.job_when(id, limit, ended)
    }

    /// Waits until a job has completed, and returns it.
    ///
    /// # Errors
    /// It failed, was cancelled, or has not ended within `limit`.
    pub fn job_completed(&self, id: &str, limit: Duration) -> Result<Value> {
        self.job_when(id, limit, |job| job["status"] == "completed")
    }

    /// Has a provision done that must complete, and returns the job.
    ///
    /// # Errors
    /// It is refused, or ends otherwise.
    pub fn completed(&self, request: &Value) -> Result<Value> {
        self.job_completed(&self.provision(request)?, JOB)
    }

    /// Has a provision done that must fail with this code, and returns the job.
    ///
    /// # Errors
    /// It is refused at once, or ends otherwise.
    pub fn failed(&self, request: &Value, code: &str) -> Result<Value> {
        let job = self.job_ended(&self.provision(request)?, JOB)?;
        ensure!(job["status"] == "failed" && job["error_code"] == code, "not failed with {code}: {job:#}");
        Ok(job)
    }

    /// Waits until a job writes to its volume.
    ///
    /// # Errors
    /// It ends before.
    pub fn populating(&self, id: &str) -> Result<Value> {
        self.job_when(id, JOB, |job| {
            job["progress"]["stage"] == "populating" && job["progress"]["bytes_processed"].as_u64() > Some(0)
        })
    }
}

fn ended(job: &Value) -> bool {
    ["completed", "failed", "cancelled"].iter().any(|status| job["status"] == *status)
}
