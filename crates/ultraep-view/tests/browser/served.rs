//! A viewer that answers on a free port until it is dropped.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::oneshot;
use ultraep_view::{Settings, Viewer, serve};

pub(crate) struct Served {
    pub(crate) address: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    pub(crate) fn start(paths: &[PathBuf]) -> Self {
        Self::with(paths, &Settings::default())
    }

    pub(crate) fn with(paths: &[PathBuf], settings: &Settings) -> Self {
        let viewer = Arc::new(Viewer::open(paths, settings).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let stopped = async { drop(stopped.await) };
            runtime.block_on(serve(listener, viewer, "127.0.0.1", stopped)).unwrap();
        });
        Self { address, stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.stop.take().map(|stop| stop.send(()));
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
