//! A gate that holds work up until a test opens it, so that a test can act in the middle of something.
//!
//! It leaves out what comes to it: see [`server`](crate::server).

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

/// What has not come to a gate by then never does.
const PATIENCE: Duration = Duration::from_secs(30);

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

    /// Waits until something has come to the gate.
    ///
    /// # Panics
    /// When nothing comes.
    pub async fn reached(&self) {
        let mut state = self.state.subscribe();
        let came = tokio::time::timeout(PATIENCE, state.wait_for(|(waiting, _)| *waiting > 0)).await;
        assert!(came.is_ok(), "nothing came to the gate");
    }

    pub(crate) async fn pass(&self) {
        self.state.send_modify(|(waiting, _)| *waiting += 1);
        let _ = self.state.subscribe().wait_for(|(_, open)| *open).await;
    }
}
