//! Servers of Debian go on after a dump and a restore, and so do the connections of their clients, who are outside the
//! tree and see nothing.
//!
//! Each test has a network of its own. It installs nothing: it says what is missing.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{DEADLINE, Scene, Target, own_ipc, own_network, rules};
use freezeframe_tests::snapshot::{Snapshot, children};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const ESTABLISHED: &[&str] = &["--tcp-established"];

struct Server {
    scene: Scene,
    target: Target,
    port: u16,
}

impl Server {
    /// Starts `words`, of which `PORT` and `DIR` stand for a port of the kernel's choice and the test's directory, when
    /// `prepare` has made what it needs.
    fn start(package: &str, words: &[&str], prepare: impl FnOnce(&Scene, u16)) -> Server {
        let program = words.iter().find(|w| w.starts_with('/')).unwrap();
        assert!(
            Path::new(program).exists(),
            "this test needs {program}: apt-get install {package}"
        );
        own_network().unwrap();
        let scene = Scene::new().unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        prepare(&scene, port);
        let fill = |w: &&str| {
            w.replace("PORT", &port.to_string())
                .replace("DIR", &scene.dir_text())
        };
        let words: Vec<String> = words.iter().map(fill).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let target = scene.start_other(&words).unwrap();
        Server {
            scene,
            target,
            port,
        }
    }

    fn await_that(&self, what: &str, mut condition: impl FnMut() -> bool) {
        self.scene
            .await_that(what, || Ok(condition()), Some(&self.target))
            .unwrap_or_else(|e| panic!("{e}\n{}", self.complaints()));
    }

    fn complaints(&self) -> String {
        let log = fs::read_to_string(self.scene.path("log")).unwrap_or_default();
        format!("{}{log}", self.scene.complaints())
    }

    /// A connection, as soon as it listens.
    fn connect(&self) -> Client {
        let mut stream = None;
        self.await_that("its port", || {
            stream = TcpStream::connect(("127.0.0.1", self.port)).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client(BufReader::new(stream))
    }

    /// Open descriptors of the first process.
    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.target.pid))
            .unwrap()
            .count()
    }

    fn leave_running(&self, way: &str, more: &[&str]) {
        let more = [&[way], more].concat();
        let dumped = self
            .scene
            .dump_pid(self.target.pid, "running", &more)
            .unwrap();
        dumped.must_exit(0).unwrap();
    }

    /// Dumps the tree, sees it gone, and restores it.
    fn cycle(&self, more: &[&str]) {
        self.end(more);
        self.restore(more);
    }

    fn end(&self, more: &[&str]) {
        let before = Snapshot::take(self.target.pid);
        let dumped = self.scene.dump_pid(self.target.pid, "img", more).unwrap();
        dumped.must_exit(0).unwrap();
        self.scene.await_gone(&before, DEADLINE).unwrap();
    }

    fn restore(&self, more: &[&str]) {
        self.scene
            .restore_pid(self.target.pid, "img", more)
            .unwrap_or_else(|e| panic!("{e}\n{}", self.complaints()));
        assert_eq!(rules().unwrap(), Vec::<String>::new());
    }

    /// It ends by a signal, with 0, and with all that belongs to it.
    fn finish(self, signal: Signal) {
        kill(Pid::from_raw(self.target.pid), signal).unwrap();
        self.scene
            .await_exit(&self.target)
            .unwrap_or_else(|e| panic!("{e}\n{}", self.complaints()));
        self.scene.nothing_left().unwrap();
    }
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn write(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// A command of redis, as it is on the wire.
    fn redis_command(words: &[&str]) -> Vec<u8> {
        let mut wire = format!("*{}\r\n", words.len());
        for word in words {
            wire += &format!("${}\r\n{word}\r\n", word.len());
        }
        wire.into_bytes()
    }

    /// What redis answers: a word, or the words of a list.
    fn redis_answer(&mut self) -> String {
        let line = self.line();
        let count = |text: &str| text.parse::<i64>().unwrap();
        match line.split_at(1) {
            ("$", length) if count(length) < 0 => "(nothing)".to_owned(),
            ("$", _) => self.line(),
            ("*", length) => {
                let words: Vec<String> = (0..count(length)).map(|_| self.redis_answer()).collect();
                words.join(" ")
            }
            (_, rest) => rest.to_owned(),
        }
    }

    fn redis(&mut self, words: &[&str]) -> String {
        self.write(&Client::redis_command(words));
        self.redis_answer()
    }

    fn get(&mut self, path: &str) {
        self.write(format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n").as_bytes());
    }

    /// The length that the head of an answer tells, when it says that all is well.
    fn http_head(&mut self) -> usize {
        let first = self.line();
        assert!(first.ends_with("200 OK"), "{first:?}");
        let mut length = None;
        loop {
            let line = self.line().to_lowercase();
            if line.is_empty() {
                return length.unwrap();
            }
            if let Some(text) = line.strip_prefix("content-length:") {
                length = text.trim().parse().ok();
            }
        }
    }

    fn http(&mut self, path: &str) -> String {
        self.get(path);
        let mut body = vec![0; self.http_head()];
        self.0.read_exact(&mut body).unwrap();
        String::from_utf8(body).unwrap()
    }
}

// ---------------------------------------------------------------- redis

const KEYS: usize = 2000;

fn redis() -> Server {
    let words = [
        "/usr/bin/redis-server",
        "--port",
        "PORT",
        "--bind",
        "127.0.0.1",
        "--dir",
        "DIR",
        "--logfile",
        "DIR/log",
        "--save",
        "",
        "--maxclients",
        "100",
    ];
    let server = Server::start("redis-server", &words, |_, _| {});
    let mut client = server.connect();
    for n in 0..KEYS {
        let answer = client.redis(&["SET", &format!("key{n}"), &format!("value {n}")]);
        assert_eq!(answer, "OK");
    }
    server
}

fn redis_has_all(client: &mut Client, more: usize) {
    assert_eq!(client.redis(&["DBSIZE"]), (KEYS + more).to_string());
    for n in 0..KEYS {
        assert_eq!(
            client.redis(&["GET", &format!("key{n}")]),
            format!("value {n}")
        );
    }
}

#[test]
fn redis_goes_on_with_its_keys() {
    let server = redis();
    let mut client = server.connect();
    assert_eq!(client.redis(&["PING"]), "PONG");
    let with = server.descriptors();
    drop(client);
    server.await_that("the client's end", || server.descriptors() < with);
    for (round, way) in ["--leave-running", "--live"].iter().enumerate() {
        server.leave_running(way, &[]);
        server.cycle(&[]);
        let mut client = server.connect();
        redis_has_all(&mut client, round);
        assert_eq!(client.redis(&["SET", &format!("more{round}"), "new"]), "OK");
        assert_eq!(client.redis(&["GET", &format!("more{round}")]), "new");
        let with = server.descriptors();
        drop(client);
        server.await_that("the client's end", || server.descriptors() < with);
    }
    server.finish(Signal::SIGTERM);
}

#[test]
fn a_client_of_redis_sees_nothing() {
    let server = redis();
    let (mut client, mut waiting) = (server.connect(), server.connect());
    waiting.write(&Client::redis_command(&["BLPOP", "list", "0"]));
    server.await_that("a client that waits", || {
        client.redis(&["INFO", "clients"]);
        // The answer is many lines: all up to the empty one at its end.
        let mut blocked = false;
        loop {
            let line = client.line();
            blocked |= line == "blocked_clients:1";
            if line.is_empty() {
                break blocked;
            }
        }
    });
    for way in ["--leave-running", "--live"] {
        server.leave_running(way, ESTABLISHED);
        assert_eq!(client.redis(&["PING"]), "PONG");
    }
    for round in 0..2 {
        let command = Client::redis_command(&["SET", "half", "a command"]);
        let (one, other) = command.split_at(command.len() / 2);
        client.write(one);
        server.end(ESTABLISHED);
        // Said while nobody is there to hear it.
        client.write(other);
        server.restore(ESTABLISHED);
        assert_eq!(client.redis_answer(), "OK");
        assert_eq!(client.redis(&["GET", "half"]), "a command");
        redis_has_all(&mut client, 1);
        assert_eq!(server.connect().redis(&["PING"]), "PONG", "round {round}");
    }
    assert_eq!(client.redis(&["RPUSH", "list", "given"]), "1");
    assert_eq!(waiting.redis_answer(), "list given");
    server.finish(Signal::SIGTERM);
}

// ---------------------------------------------------------------- nginx

const DOWNLOAD: usize = 20 << 20;
const LAST: usize = DOWNLOAD / 8 * 7;

fn nginx_configure(scene: &Scene, port: u16, says: &str) {
    let dir = scene.dir_text();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|name| format!("{name}_temp_path {dir}/{name};\n"))
        .collect();
    let text = format!(
        "daemon off;\nworker_processes 2;\npid {dir}/pid;\nerror_log {dir}/log;\nevents {{}}\nhttp {{\n{temporary}\
         access_log off;\nserver {{\nlisten 127.0.0.1:{port};\nroot {dir};\n\
         location = /says {{ return 200 '{says}'; }}\nlocation = /download {{ limit_rate 3m; }}\n}}\n}}\n"
    );
    fs::write(scene.path("conf"), text).unwrap();
}

/// Bytes that no two places of are alike.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(len / 8).flatten().collect()
}

fn nginx() -> Server {
    let words = ["/usr/sbin/nginx", "-c", "DIR/conf", "-e", "DIR/log"];
    let server = Server::start("nginx-light", &words, |scene, port| {
        nginx_configure(scene, port, "one");
        fs::write(scene.path("download"), noise(DOWNLOAD)).unwrap();
    });
    server.await_that("two workers", || children(server.target.pid).len() == 2);
    assert_eq!(server.connect().http("/says"), "one");
    server
}

#[test]
fn nginx_serves_and_reloads() {
    let server = nginx();
    // A connection that is kept alive, of which the server hears nothing for a while.
    let mut client = server.connect();
    assert_eq!(client.http("/says"), "one");
    server.leave_running("--live", ESTABLISHED);
    for _ in 0..2 {
        server.cycle(ESTABLISHED);
        assert_eq!(client.http("/says"), "one");
        assert_eq!(server.connect().http("/says"), "one");
    }
    let before = children(server.target.pid);
    nginx_configure(&server.scene, server.port, "two");
    kill(Pid::from_raw(server.target.pid), Signal::SIGHUP).unwrap();
    server.await_that("other workers", || {
        let now = children(server.target.pid);
        now.len() == 2 && now.iter().all(|pid| !before.contains(pid))
    });
    assert_eq!(server.connect().http("/says"), "two");
    server.cycle(ESTABLISHED);
    assert_eq!(server.connect().http("/says"), "two");
    server.finish(Signal::SIGQUIT);
}

#[test]
fn a_download_spans_the_checkpoint() {
    let server = nginx();
    let mut client = server.connect();
    client.get("/download");
    assert_eq!(client.http_head(), DOWNLOAD);
    let got = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&got);
    // The last part is not read before all is done, however long that takes.
    let (finish, may_finish) = std::sync::mpsc::channel::<()>();
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; DOWNLOAD];
        let mut at = 0;
        while at < DOWNLOAD {
            let most = if at < LAST { LAST } else { DOWNLOAD };
            if most == DOWNLOAD {
                let _ = may_finish.recv();
            }
            match client.0.read(&mut all[at..most]) {
                Ok(0) => return Err(format!("the end after {at} bytes")),
                Ok(n) => at += n,
                Err(e) => return Err(format!("{e} after {at} bytes")),
            }
            seen.store(at, Ordering::Relaxed);
        }
        Ok(all)
    });
    let reaches = |part: usize| {
        server.await_that("bytes", || {
            got.load(Ordering::Relaxed) >= DOWNLOAD * part / 8
        });
    };
    reaches(1);
    server.leave_running("--live", ESTABLISHED);
    for part in [2, 3] {
        reaches(part);
        server.end(ESTABLISHED);
        let at = got.load(Ordering::Relaxed);
        assert!(at < DOWNLOAD, "it was over too soon");
        server.restore(ESTABLISHED);
    }
    drop(finish);
    let all = reader.join().unwrap().unwrap();
    assert!(all == noise(DOWNLOAD), "it came otherwise than it was sent");
    server.finish(Signal::SIGQUIT);
}

// ---------------------------------------------------------------- PostgreSQL

const POSTGRES: &str = "/usr/lib/postgresql/15/bin/";

/// The user that Debian makes for it: it does not run as root.
fn postgres_uid() -> u32 {
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let line = users.lines().find(|l| l.starts_with("postgres:"));
    let line = line.expect("this test needs the user postgres: apt-get install postgresql-15");
    line.split(':').nth(2).unwrap().parse().unwrap()
}

fn postgres() -> Server {
    let uid = postgres_uid();
    let (program, uid_text) = (format!("{POSTGRES}postgres"), uid.to_string());
    // Its segment of System V shared memory goes with the test.
    own_ipc().unwrap();
    let words = [
        "--uid",
        &uid_text,
        &program,
        "-D",
        "DIR/data",
        "-k",
        "DIR",
        "-p",
        "PORT",
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "fsync=off",
    ];
    let server = Server::start("postgresql-15", &words, |scene, _| {
        let mut initdb = Command::new(format!("{POSTGRES}initdb"));
        initdb.args(["--no-sync", "--auth=trust", "-U", "postgres", "-D"]);
        initdb.arg(scene.path("data")).uid(uid).current_dir("/");
        let made = initdb.output().unwrap();
        assert!(made.status.success(), "{made:?}");
    });
    server.await_that("a server that takes clients", || {
        let mut ready = server.postgres_client("pg_isready");
        ready.stdout(Stdio::null()).status().unwrap().success()
    });
    server
}

impl Server {
    fn postgres_client(&self, program: &str) -> Command {
        let mut command = Command::new(format!("{POSTGRES}{program}"));
        let port = self.port.to_string();
        command.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &port]);
        command
    }
}

/// psql, a statement at a time.
struct Psql {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Psql {
    fn start(server: &Server) -> Psql {
        let mut command = server.postgres_client("psql");
        let mut child = command
            .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "postgres"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Psql { child, answers }
    }

    fn say(&mut self, statements: &str) {
        let input = self.child.stdin.as_mut().unwrap();
        writeln!(input, "{statements}").unwrap();
    }

    /// The one line that a query gives.
    fn ask(&mut self, query: &str) -> String {
        self.say(query);
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

#[test]
fn a_transaction_of_postgres_is_committed_after_the_restore() {
    let server = postgres();
    let mut psql = Psql::start(&server);
    psql.say("CREATE TABLE kept (n int); BEGIN; INSERT INTO kept SELECT generate_series(1, 1000);");
    assert_eq!(psql.ask("SELECT count(*) FROM kept;"), "1000");
    server.leave_running("--live", ESTABLISHED);
    for round in 0..2 {
        server.cycle(ESTABLISHED);
        psql.say("INSERT INTO kept VALUES (0);");
        let expected = (1001 + round).to_string();
        assert_eq!(psql.ask("SELECT count(*) FROM kept;"), expected);
        let mut other = Psql::start(&server);
        assert_eq!(
            other.ask("SELECT count(*) FROM kept;"),
            "0",
            "seen before the commit"
        );
        other.end();
    }
    psql.say("COMMIT;");
    let mut other = Psql::start(&server);
    assert_eq!(psql.ask("SELECT count(*) FROM kept;"), "1002");
    assert_eq!(other.ask("SELECT sum(n) FROM kept;"), "500500");
    other.end();
    psql.end();
    server.finish(Signal::SIGINT);
}

#[test]
fn pgbench_loses_nothing_over_ten_rounds() {
    let server = postgres();
    let mut fill = server.postgres_client("pgbench");
    let filled = fill.args(["-i", "-q", "postgres"]).output().unwrap();
    assert!(filled.status.success(), "{filled:?}");
    let mut bench = server.postgres_client("pgbench");
    // 2,000 transactions, 150 a second.
    let bench = bench.args(["-n", "-c", "4", "-t", "500", "-R", "150", "postgres"]);
    let bench = bench
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut psql = Psql::start(&server);
    let mut done = || -> usize {
        let count = psql.ask("SELECT count(*) FROM pgbench_history;");
        count.parse().unwrap()
    };
    for round in 0..10 {
        server.await_that("transactions", || done() >= 100 * (round + 1));
        server.cycle(ESTABLISHED);
    }
    let told = bench.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.status.success(), "{told:?}");
    assert!(text.contains("actually processed: 2000/2000"), "{text}");
    assert_eq!(done(), 2000);
    assert_eq!(
        psql.ask("SELECT (SELECT sum(delta) FROM pgbench_history) = (SELECT sum(abalance) FROM pgbench_accounts);"),
        "t"
    );
    psql.end();
    server.finish(Signal::SIGINT);
}

// ---------------------------------------------------------------- runtimes

fn source(name: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("real");
    dir.join(name).to_string_lossy().into_owned()
}

#[test]
fn a_client_of_node_keeps_its_connection() {
    let words = ["/usr/bin/node", &source("http.js"), "PORT"];
    let server = Server::start("nodejs", &words, |_, _| {});
    let mut client = server.connect();
    assert_eq!(client.http("/"), "1 of 1");
    server.leave_running("--live", ESTABLISHED);
    assert_eq!(client.http("/"), "2 of 2");
    for round in 0..2 {
        server.cycle(ESTABLISHED);
        assert_eq!(
            client.http("/"),
            format!("{} of {}", 3 + round, 3 + 2 * round)
        );
        assert_eq!(
            server.connect().http("/"),
            format!("1 of {}", 4 + 2 * round)
        );
    }
    server.finish(Signal::SIGTERM);
}

#[test]
fn a_client_of_java_keeps_its_connection() {
    let words = [
        "/usr/bin/java",
        "-Xmx128m",
        "-XX:-UsePerfData",
        "-cp",
        "DIR",
        "Web",
        "PORT",
    ];
    let server = Server::start("openjdk-17-jdk-headless", &words, |scene, _| {
        let dir = scene.dir_text();
        let mut compile = Command::new("/usr/bin/javac");
        compile.args(["-d", &dir, &source("Web.java")]);
        assert!(compile.status().unwrap().success());
    });
    let mut client = server.connect();
    assert_eq!(client.http("/"), "request 1");
    server.leave_running("--live", ESTABLISHED);
    assert_eq!(client.http("/"), "request 2");
    for round in 0..2 {
        server.cycle(ESTABLISHED);
        assert_eq!(client.http("/"), format!("request {}", 3 + 2 * round));
        assert_eq!(
            server.connect().http("/"),
            format!("request {}", 4 + 2 * round)
        );
    }
    server.finish(Signal::SIGTERM);
}

#[test]
fn a_pair_of_asyncio_goes_on_inside_the_tree() {
    let words = ["/usr/bin/python3", &source("asyncio_echo.py"), "DIR"];
    let server = Server::start("python3", &words, |_, _| {});
    let progress = || -> usize {
        let text = fs::read_to_string(server.scene.path("progress"));
        text.ok().and_then(|t| t.parse().ok()).unwrap_or(0)
    };
    let goes_on = || {
        let before = progress();
        server.await_that("more lines", || progress() >= before + 50);
    };
    goes_on();
    server.leave_running("--leave-running", ESTABLISHED);
    goes_on();
    server.leave_running("--live", ESTABLISHED);
    for _ in 0..2 {
        goes_on();
        server.cycle(ESTABLISHED);
    }
    goes_on();
    fs::write(server.scene.path("stop"), "").unwrap();
    server
        .scene
        .await_exit(&server.target)
        .unwrap_or_else(|e| panic!("{e}\n{}", server.complaints()));
    server.scene.nothing_left().unwrap();
}
