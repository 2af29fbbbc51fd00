//! A gate that holds work up until a test opens it, so that a test can act in the middle of something.
//!
//! It leaves out what comes to it: see [`server`](crate::server).

use std::sync::Arc;

use tokio::sync::watch;

/// What answers wait at. Clones are the same gate.
#[derive(Debug, Clone)]
pub struct Gate {
    state: Arc<watch::Sender<(usize, bool)>>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { state: Arc::new(watch::Sender::new((0, false))) }
    }
}

impl Gate {
    /// Lets everybody through, for good.
    pub fn open(&self) {
        self.state.send_modify(|(_, open)| *open = true);
    }

    /// Waits until an answer has come to the gate.
    pub async fn reached(&self) {
        let _ = self.state.subscribe().wait_for(|(waiting, _)| *waiting > 0).await;
    }

    pub(crate) async fn pass(&self) {
        self.state.send_modify(|(waiting, _)| *waiting += 1);
        let _ = self.state.subscribe().wait_for(|(_, open)| *open).await;
    }
}
