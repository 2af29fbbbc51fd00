//! An HTTP/1.1 server that misbehaves on demand: what object stores, proxies and web servers do to a download.
//!
//! Each path has one [`Page`], which says what is served and what goes wrong; all requests are kept, with their headers.
//! All connections together can be given a rate, as a link has one. A [`Gate`] holds an answer up in the middle for as long
//! as a test wants.
//! It runs on its own thread, so it serves tests with and without a runtime. It leaves out request bodies, and how
//! certificates are made: see [`tls`](crate::tls).

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
};
use tokio_rustls::TlsAcceptor;

use crate::{gate::Gate, tls::Identity};

/// Of this machine, for nobody else.
const FREE_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// A server that is killed ends within this.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest head of a request, in bytes.
const HEAD: usize = 64 << 10;
/// Bytes that are written at once.
const PIECE: usize = 16 << 10;
/// The same over a link with a rate: some milliseconds of it, since timers are no finer.
const PIECE_OF_LINK: usize = 256 << 10;
/// What a link may catch up after a timer that was late.
const LATE: Duration = Duration::from_millis(20);

/// What is served at one path. Without any of the methods: 200, ranges, an ETag, and the truth.
#[derive(Debug, Clone, Default)]
pub struct Page {
    body: Bytes,
    etag: Option<String>,
    last_modified: Option<String>,
    headers: Vec<(String, String)>,
    failures: Vec<(u16, Vec<(String, String)>)>,
    next: Option<(u64, Box<Page>)>,
    redirect: Option<String>,
    head_status: Option<u16>,
    cuts: Vec<u64>,
    stalls: Vec<u64>,
    resets: Vec<u64>,
    gate: Option<(u64, Gate)>,
    pace: Option<(usize, Duration)>,
    no_ranges: bool,
    ignores_ranges: bool,
    ignores_if_match: bool,
    chunked: bool,
    announced: Option<u64>,
    wrong_range: bool,
}

impl Page {
    /// Serves these bytes, with an ETag made of them.
    pub fn new(body: impl Into<Bytes>) -> Self {
        let body = body.into();
        let sum = body.iter().fold(body.len() as u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
        Self { etag: Some(format!("\"{sum:x}\"")), body, ..Self::default() }
    }

    /// Another ETag, or none.
    #[must_use]
    pub fn etag(mut self, etag: Option<&str>) -> Self {
        self.etag = etag.map(str::to_owned);
        self
    }

    /// A `Last-Modified`.
    #[must_use]
    pub fn last_modified(mut self, value: &str) -> Self {
        self.last_modified = Some(value.to_owned());
        self
    }

    /// One more header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Answers the next `times` requests with this status.
    #[must_use]
    pub fn fail(self, times: usize, status: u16) -> Self {
        self.fail_with(times, status, &[])
    }

    /// As [`Page::fail`], with headers such as `Retry-After`.
    #[must_use]
    pub fn fail_with(mut self, times: usize, status: u16, headers: &[(&str, &str)]) -> Self {
        let headers: Vec<_> = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        self.failures.extend(std::iter::repeat_n((status, headers), times));
        self
    }

    /// After `requests` requests, serves another page in its place.
    #[must_use]
    pub fn then(mut self, requests: u64, page: Page) -> Self {
        self.next = Some((requests, Box::new(page)));
        self
    }

    /// Redirects, with status 302.
    #[must_use]
    pub fn redirect(mut self, location: &str) -> Self {
        self.redirect = Some(location.to_owned());
        self
    }

    /// Answers HEAD with this status.
    #[must_use]
    pub fn head_status(mut self, status: u16) -> Self {
        self.head_status = Some(status);
        self
    }

    /// Closes the connection before this byte of the object, once for each value.
    #[must_use]
    pub fn cut(mut self, at: &[u64]) -> Self {
        self.cuts = at.to_vec();
        self
    }

    /// Sends nothing more from this byte of the object on, once for each value.
    #[must_use]
    pub fn stall(mut self, at: &[u64]) -> Self {
        self.stalls = at.to_vec();
        self
    }

    /// Resets the connection (RST) before this byte of the object, once for each value.
    #[must_use]
    pub fn reset(mut self, at: &[u64]) -> Self {
        self.resets = at.to_vec();
        self
    }

    /// Sends nothing from this byte of the object on until the gate is open.
    #[must_use]
    pub fn hold(mut self, at: u64, gate: &Gate) -> Self {
        self.gate = Some((at, gate.clone()));
        self
    }

    /// Sends so many bytes, then waits, again and again.
    #[must_use]
    pub fn pace(mut self, bytes: usize, wait: Duration) -> Self {
        self.pace = Some((bytes, wait));
        self
    }

    /// Knows no ranges: always 200 and everything.
    #[must_use]
    pub fn no_ranges(mut self) -> Self {
        self.no_ranges = true;
        self
    }

    /// Says that it has ranges, but always answers with 200 and everything.
    #[must_use]
    pub fn ignores_ranges(mut self) -> Self {
        self.ignores_ranges = true;
        self
    }

    /// Does not look at `If-Match`.
    #[must_use]
    pub fn ignores_if_match(mut self) -> Self {
        self.ignores_if_match = true;
        self
    }

    /// Sends no length, but chunks.
    #[must_use]
    pub fn chunked(mut self) -> Self {
        self.chunked = true;
        self
    }

    /// Announces this length (in HEAD too), whatever is sent.
    #[must_use]
    pub fn announce(mut self, length: u64) -> Self {
        self.announced = Some(length);
        self
    }

    /// Answers a range with another one.
    #[must_use]
    pub fn wrong_range(mut self) -> Self {
        self.wrong_range = true;
        self
    }
}

/// A request that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// `GET`, `HEAD`, …
    pub method: String,
    /// The path with its query.
    pub target: String,
    /// The headers, names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Received {
    /// The first header of this (lower-case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }
}

#[derive(Default)]
struct Site {
    pages: HashMap<String, Page>,
    received: Vec<Received>,
    link: Option<Arc<Link>>,
}

/// What all connections share.
struct Link {
    bytes_per_second: f64,
    /// When it has sent all that was given to it.
    free: Mutex<Instant>,
}

impl Link {
    /// Waits until so many bytes have gone through.
    pub(crate) async fn pass(&self, bytes: usize) {
        let until = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let earliest = Instant::now().checked_sub(LATE).unwrap_or(*free);
            *free = (*free).max(earliest) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
            *free
        };
        tokio::time::sleep_until(until.into()).await;
    }
}

/// A running server; it stops when dropped.
pub struct Server {
    address: SocketAddr,
    site: Arc<Mutex<Site>>,
    runtime: Option<Runtime>,
    authority: Option<String>,
}

impl Server {
    /// Starts a server without pages on a free port of 127.0.0.1: every path is 404.
    ///
    /// # Panics
    /// When no port or thread can be had.
    pub fn start() -> Self {
        Self::run(FREE_PORT, None, Site::default())
    }

    /// As [`Server::start`], in place of one that was there and is gone, with this page from the first moment on.
    ///
    /// # Panics
    /// When the port is taken.
    pub fn start_at(address: SocketAddr, path: &str, page: Page) -> Self {
        let pages = HashMap::from([(path.to_owned(), page)]);
        Self::run(address, None, Site { pages, ..Site::default() })
    }

    /// As [`Server::start`], with TLS under a certificate for its address that it makes and signs itself.
    ///
    /// # Panics
    /// When no certificate, port or thread can be had.
    pub fn start_tls() -> Self {
        Self::start_tls_as(&Identity::self_signed("127.0.0.1"))
    }

    /// As [`Server::start`], with TLS under this certificate.
    ///
    /// # Panics
    /// When it cannot be used.
    pub fn start_tls_as(identity: &Identity) -> Self {
        let mut server = Self::run(FREE_PORT, Some(identity.acceptor()), Site::default());
        server.authority = Some(identity.authority().to_owned());
        server
    }

    /// With TLS: the certificate to trust, as PEM.
    pub fn authority(&self) -> Option<&str> {
        self.authority.as_deref()
    }

    /// Ends it with all its connections, and gives its port back. Gives its address.
    ///
    /// # Panics
    /// When it does not end.
    pub fn kill(mut self) -> SocketAddr {
        let runtime = self.runtime.take().expect("it runs");
        // On a thread of its own: a runtime's own threads must not wait for another one.
        std::thread::spawn(|| runtime.shutdown_timeout(PATIENCE)).join().expect("the end of a server");
        self.address
    }

    fn run(address: SocketAddr, tls: Option<TlsAcceptor>, site: Site) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let site = Arc::new(Mutex::new(site));
        let shared = site.clone();
        // A port that was given back can be taken again at once.
        let listener = std::net::TcpListener::bind(address).expect("a port");
        listener.set_nonblocking(true).expect("a non-blocking socket");
        let address = listener.local_addr().expect("an address");
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            while let Ok((stream, _)) = listener.accept().await {
                let (site, tls) = (shared.clone(), tls.clone());
                tokio::spawn(async move {
                    // A client that goes away in the middle is what some tests do.
                    let _ = connection(stream, tls, &site).await;
                });
            }
        });
        Self { address, site, runtime: Some(runtime), authority: None }
    }

    /// The URL of a path (which begins with `/`).
    pub fn url(&self, path: &str) -> String {
        let scheme = if self.authority.is_some() { "https" } else { "http" };
        format!("{scheme}://{}{path}", self.address)
    }

    /// Serves a page at a path, in place of what was there.
    pub fn serve(&self, path: &str, page: Page) {
        site(&self.site).pages.insert(path.to_owned(), page);
    }

    /// From now on all connections together get so many bytes of content a second.
    pub fn limit(&self, bytes_per_second: u64) {
        let link = Link { bytes_per_second: bytes_per_second as f64, free: Mutex::new(Instant::now()) };
        site(&self.site).link = Some(Arc::new(link));
    }

    /// Serves nothing there any more.
    pub fn remove(&self, path: &str) {
        site(&self.site).pages.remove(path);
    }

    /// All requests so far, in order.
    pub fn received(&self) -> Vec<Received> {
        site(&self.site).received.clone()
    }

    /// How many requests of this method came for a path, whatever their query.
    pub fn count(&self, method: &str, path: &str) -> usize {
        self.received().iter().filter(|request| request.method == method && request.path() == path).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn site(site: &Mutex<Site>) -> MutexGuard<'_, Site> {
    site.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn connection(mut stream: TcpStream, tls: Option<TlsAcceptor>, site: &Mutex<Site>) -> std::io::Result<()> {
    if let Some(tls) = tls {
        return serve(&mut tls.accept(stream).await?, site).await.map(drop);
    }
    if let Some(End::Reset) = serve(&mut stream, site).await? {
        stream.set_zero_linger()?;
    }
    Ok(())
}

/// One request and its answer; says how the answer ended before its end.
async fn serve(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    shared: &Mutex<Site>,
) -> std::io::Result<Option<End>> {
    let Some(request) = read_request(stream).await? else { return Ok(None) };
    let (answer, link) = {
        let mut site = site(shared);
        site.received.push(request.clone());
        let answer = match site.pages.get_mut(request.path()) {
            Some(page) => answer(page, &request),
            None => Answer::status(404, &[]),
        };
        (answer, site.link.clone())
    };
    let end = answer.end.as_ref().map(|(_, end)| end.clone());
    answer.send(stream, request.method == "HEAD", link.as_deref()).await?;
    if !matches!(end, Some(End::Reset)) {
        stream.shutdown().await?;
    }
    Ok(end)
}

async fn read_request(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> std::io::Result<Option<Received>> {
    let mut head = Vec::new();
    // What begins with a control character is TLS, and answered as web servers do: with a status in clear text.
    while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD && !head.first().is_some_and(u8::is_ascii_control) {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return Ok(None),
        }
    }
    let head = String::from_utf8_lossy(&head);
    let mut lines = head.lines();
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        Answer::status(400, &[]).send(stream, false, None).await?;
        return Ok(None);
    };
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Ok(Some(Received { method: method.to_owned(), target: target.to_owned(), headers }))
}

/// How an answer breaks off.
#[derive(Debug, Clone)]
enum End {
    Cut,
    Stall,
    Reset,
    /// It goes on when the gate is open.
    Hold(Gate),
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Bytes,
    chunked: bool,
    /// What happens after so many bytes of the body.
    end: Option<(usize, End)>,
    pace: Option<(usize, Duration)>,
}

impl Answer {
    fn status(status: u16, headers: &[(String, String)]) -> Self {
        let mut headers = headers.to_vec();
        headers.push(("content-length".to_owned(), "0".to_owned()));
        Self { status, headers, body: Bytes::new(), chunked: false, end: None, pace: None }
    }

    async fn send(
        self,
        stream: &mut (impl AsyncWrite + Unpin),
        head_only: bool,
        link: Option<&Link>,
    ) -> std::io::Result<()> {
        let mut head = format!("HTTP/1.1 {} Status\r\nconnection: close\r\n", self.status);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).await?;
        if head_only {
            return Ok(());
        }
        let (first, end) = match &self.end {
            Some((limit, end)) => (*limit, Some(end)),
            None => (self.body.len(), None),
        };
        self.send_part(stream, link, self.body.slice(..first)).await?;
        match end {
            Some(End::Stall) => std::future::pending::<()>().await,
            Some(End::Hold(gate)) => {
                gate.pass().await;
                self.send_part(stream, link, self.body.slice(first..)).await?;
            }
            Some(End::Cut | End::Reset) => return Ok(()),
            None => {}
        }
        if self.chunked {
            stream.write_all(b"0\r\n\r\n").await?;
        }
        Ok(())
    }

    async fn send_part(
        &self,
        stream: &mut (impl AsyncWrite + Unpin),
        link: Option<&Link>,
        sent: Bytes,
    ) -> std::io::Result<()> {
        let usual = if link.is_some() { PIECE_OF_LINK } else { PIECE };
        for piece in sent.chunks(self.pace.map_or(usual, |(bytes, _)| bytes)) {
            if let Some(link) = link {
                link.pass(piece.len()).await;
            }
            if self.chunked {
                stream.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await?;
            }
            stream.write_all(piece).await?;
            if self.chunked {
                stream.write_all(b"\r\n").await?;
            }
            if let Some((_, wait)) = self.pace {
                tokio::time::sleep(wait).await;
            }
        }
        stream.flush().await
    }
}

/// What a page answers; what happens once is used up.
fn answer(page: &mut Page, request: &Received) -> Answer {
    match &mut page.next {
        Some((0, next)) => *page = std::mem::take(next),
        Some((requests, _)) => *requests -= 1,
        None => {}
    }
    if !page.failures.is_empty() {
        let (status, headers) = page.failures.remove(0);
        return Answer::status(status, &headers);
    }
    if let Some(location) = &page.redirect {
        return Answer::status(302, &[("location".to_owned(), location.clone())]);
    }
    if request.method == "HEAD"
        && let Some(status) = page.head_status
    {
        return Answer::status(status, &[]);
    }
    let wanted = request.header("if-match");
    if !page.ignores_if_match && wanted.is_some_and(|wanted| page.etag.as_deref() != Some(wanted)) {
        return Answer::status(412, &[]);
    }
    content(page, request)
}

fn content(page: &mut Page, request: &Received) -> Answer {
    let size = page.body.len();
    let mut headers = page.headers.clone();
    let range = request.header("range").filter(|_| !page.no_ranges && !page.ignores_ranges && request.method == "GET");
    let (status, from, to) = match range.map(|range| parse_range(range, size)) {
        None => (200, 0, size),
        Some(Some((from, to))) => (206, from, to),
        Some(None) => return Answer::status(416, &[("content-range".to_owned(), format!("bytes */{size}"))]),
    };
    let end = (request.method == "GET").then(|| ending(page, from, to)).flatten();
    let announced = page.announced.unwrap_or((to - from) as u64);
    if status == 206 {
        let first = if page.wrong_range { from + 1 } else { from };
        headers.push(("content-range".to_owned(), format!("bytes {first}-{}/{size}", to.saturating_sub(1))));
    }
    let tells_length = request.method == "HEAD" && page.announced.is_some();
    if page.chunked && !tells_length {
        headers.push(("transfer-encoding".to_owned(), "chunked".to_owned()));
    } else {
        headers.push(("content-length".to_owned(), announced.to_string()));
    }
    headers.push(("accept-ranges".to_owned(), if page.no_ranges { "none" } else { "bytes" }.to_owned()));
    headers.extend(page.etag.iter().map(|etag| ("etag".to_owned(), etag.clone())));
    headers.extend(page.last_modified.iter().map(|time| ("last-modified".to_owned(), time.clone())));
    let body = page.body.slice(from..to);
    Answer { status, headers, body, chunked: page.chunked, end, pace: page.pace }
}

/// Where this answer breaks off: at the first point of each kind that lies inside what it sends, which is then used up.
fn ending(page: &mut Page, from: usize, to: usize) -> Option<(usize, End)> {
    let take = |points: &mut Vec<u64>, end| {
        let at = points.iter().position(|at| (from as u64..to as u64).contains(at))?;
        Some((points.remove(at) as usize - from, end))
    };
    let held = page.gate.as_ref().filter(|(at, _)| (from as u64..to as u64).contains(at));
    let held = held.map(|(at, gate)| (*at as usize - from, End::Hold(gate.clone())));
    take(&mut page.cuts, End::Cut)
        .or_else(|| take(&mut page.resets, End::Reset))
        .or_else(|| take(&mut page.stalls, End::Stall))
        .or(held)
}

/// `bytes=A-B` or `bytes=A-`: from, and the byte after the last.
fn parse_range(value: &str, size: usize) -> Option<(usize, usize)> {
    let (from, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    let from: usize = from.parse().ok()?;
    let to = if last.is_empty() { size } else { (last.parse::<usize>().ok()? + 1).min(size) };
    (from < to).then_some((from, to))
}
