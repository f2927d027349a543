//! AIO contexts, as the kernel has them: what no system call tells of them is read from the
//! kernel itself by a BPF program of ours.
//!
//! # References
//! io_setup(2), io_submit(2); the kernel's include/uapi/linux/aio_abi.h, and its
//! `struct kioctx` and `struct percpu_ref`, whose fields its BTF tells

use std::os::fd::{AsRawFd, OwnedFd};

use freezeframe_error::{Error, Result, ResultExt};

use crate::bpf::{
    ADD, CALL, EXIT, FRAME, JUMP, JUMP_IF, JUMP_UNLESS, LOAD_8, LOAD_HELD, MOVE, OF_MAP, R0, R1,
    R2, R3, R6, R7, SET, STORE_8, load_callable, op, per_cpu_map, run,
};
use crate::btf::{Btf, Field, Is};
use crate::ids::Pid;
use crate::mmap::PAGE_SIZE;
use crate::sched::possible_cpus;
use crate::task_fields::TaskIter;

/// A context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// What programs know it by: the address of its ring.
    pub address: u64,
    /// Bytes of the ring.
    pub len: u64,
    /// How many requests io_setup(2) was asked for.
    pub requests: u32,
    /// How many events the ring has room for, less one.
    pub events: u32,
    /// Where the kernel puts the next event.
    pub tail: u32,
    /// Requests that have not ended yet.
    pub under_way: u64,
    /// Some of them can be cancelled, and may never end by themselves.
    pub cancellable: bool,
}

/// Whether any process of this machine has a context.
pub fn in_use() -> Result<bool> {
    const COUNT: &str = "/proc/sys/fs/aio-nr";
    match std::fs::read_to_string(COUNT) {
        Ok(text) => Ok(text.trim() != "0"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io("read", e).on(COUNT)),
    }
}

/// For how many requests a context can be at most.
pub const MOST: u32 = 0x1000_0000 / EVENT as u32 / 2;

/// How large a ring the kernel makes: bytes, and events it has room for.
pub fn ring_size(requests: u32, cpus: usize) -> (u64, u32) {
    let events = 2 * u64::from(requests).max(4 * cpus as u64) + 2;
    let len = (HEAD + events * EVENT).next_multiple_of(PAGE_SIZE as u64);
    (len, ((len - HEAD) / EVENT) as u32)
}

/// `struct aio_ring`, before its events.
pub const HEAD: u64 = 32;
/// `struct io_event`.
pub const EVENT: u64 = 32;

/// What reads the contexts of processes.
#[derive(Debug)]
pub struct Reader {
    tasks: TaskIter,
    peek: Peek,
    /// How much further on each CPU has its own memory.
    cpus: Vec<u64>,
    at: Places,
}

/// Where what is read is, in the structure that has it.
#[derive(Debug)]
struct Places {
    table: Field,
    contexts: Field,
    each: Field,
    user_id: Field,
    mmap_size: Field,
    max_reqs: Field,
    nr_events: Field,
    tail: Field,
    active: Field,
    counts: Field,
    count_data: Field,
    count: Field,
}

impl Places {
    fn of(btf: &Btf) -> Result<Places> {
        let [mm, table, context] =
            ["mm_struct", "kioctx_table", "kioctx"].map(|name| btf.find(Is::Struct, name));
        let (table, context) = (table?, context?);
        let data = btf.find(Is::Struct, "percpu_ref_data")?;
        let of_context = |path: &str| btf.field(context, path);
        Ok(Places {
            table: btf.field(mm?, "ioctx_table")?,
            contexts: btf.field(table, "nr")?,
            each: btf.field(table, "table")?,
            user_id: of_context("user_id")?,
            mmap_size: of_context("mmap_size")?,
            max_reqs: of_context("max_reqs")?,
            nr_events: of_context("nr_events")?,
            tail: of_context("tail")?,
            active: of_context("active_reqs")?,
            counts: of_context("reqs.percpu_count_ptr")?,
            count_data: of_context("reqs.data")?,
            count: btf.field(data, "count")?,
        })
    }
}

/// What the kernel adds to a count that it keeps for each CPU (`PERCPU_COUNT_BIAS`).
const BIAS: u64 = 1 << 63;
/// Of the count of requests: that of the context itself, and that of whoever has made it.
const NOT_REQUESTS: u64 = 2;
/// More contexts than a process has.
const MANY: u64 = 1 << 20;

impl Reader {
    /// Needs CAP_BPF and CAP_PERFMON (EPERM), and a kernel that tells its types.
    pub fn new() -> Result<Reader> {
        // First what is refused soonest.
        let peek = Peek::new()?;
        let btf = Btf::of_kernel()?;
        // No name leads to where CPUs have their own memory: but we can have some there.
        let value = btf.field(btf.find(Is::Struct, "bpf_array")?, "pptrs")?;
        let common = peek.at(peek.ask(0, MAP)? + u64::from(value.offset))?;
        let own = |cpu: u32| {
            let at = peek.ask(0, VALUE + u64::from(cpu))?;
            Ok(at.wrapping_sub(common))
        };
        Ok(Reader {
            tasks: TaskIter::of(&btf)?,
            cpus: possible_cpus()?
                .into_iter()
                .map(own)
                .collect::<Result<_>>()?,
            peek,
            at: Places::of(&btf)?,
        })
    }

    /// The contexts of a process, which is stopped.
    pub fn contexts(&self, process: Pid) -> Result<Vec<Context>> {
        let Some(memory) = self.tasks.memory(process)? else {
            return Ok(Vec::new());
        };
        let table = self.long(memory, self.at.table)?;
        if table == 0 {
            return Ok(Vec::new());
        }
        let places = u64::from(self.word(table, self.at.contexts)?).min(MANY);
        let first = table + u64::from(self.at.each.offset);
        let mut all = Vec::new();
        for place in 0..places {
            let context = self.peek.at(first + 8 * place)?;
            if context != 0 {
                all.push(self.context(context).on("an AIO context")?);
            }
        }
        Ok(all)
    }

    fn context(&self, of: u64) -> Result<Context> {
        let active = of + u64::from(self.at.active.offset);
        Ok(Context {
            address: self.long(of, self.at.user_id)?,
            len: self.long(of, self.at.mmap_size)?,
            requests: self.word(of, self.at.max_reqs)?,
            events: self.word(of, self.at.nr_events)?,
            tail: self.word(of, self.at.tail)?,
            under_way: self.under_way(of)?,
            // A list that is empty refers to itself.
            cancellable: self.peek.at(active)? != active,
        })
    }

    /// Each CPU has a count of its own, of which only the sum says something.
    fn under_way(&self, of: u64) -> Result<u64> {
        let counts = self.long(of, self.at.counts)?;
        if counts & 3 != 0 {
            return Err(Error::unsupported("an AIO context that is being destroyed"));
        }
        let data = self.long(of, self.at.count_data)?;
        let mut sum = self.long(data, self.at.count)?.wrapping_sub(BIAS);
        for cpu in &self.cpus {
            sum = sum.wrapping_add(self.peek.at(counts.wrapping_add(*cpu))?);
        }
        Ok(sum.wrapping_sub(NOT_REQUESTS))
    }

    fn long(&self, of: u64, field: Field) -> Result<u64> {
        self.peek.at(of + u64::from(field.offset))
    }

    fn word(&self, of: u64, field: Field) -> Result<u32> {
        Ok(self.long(of, field)? as u32)
    }
}

/// The program.
#[derive(Debug)]
struct Peek(OwnedFd);

impl Peek {
    fn new() -> Result<Peek> {
        let map = per_cpu_map()?;
        load_callable(&program(&map)).map(Peek)
    }

    /// Eight bytes of the kernel's memory.
    fn at(&self, address: u64) -> Result<u64> {
        self.ask(address, MEMORY)
    }

    fn ask(&self, address: u64, what: u64) -> Result<u64> {
        let mut words = [address, what];
        match run(&self.0, &mut words)? {
            0 => Ok(words[0]),
            _ => Err(Error::unsupported("the kernel's memory cannot be read")),
        }
    }
}

/// What the program is asked for by its second word: memory, where the map is, and, from here
/// on, where the map's value is for each CPU.
const MEMORY: u64 = 0;
const MAP: u64 = 1;
const VALUE: u64 = 2;

/// Replaces the first word it is given by what the second asks for: what is there in the
/// kernel's memory, if that.
fn program(map: &OwnedFd) -> Vec<u64> {
    const LOOKUP_PERCPU: i32 = 195;
    const PROBE_READ_KERNEL: i32 = 113;
    vec![
        op(MOVE, R6, R1, 0, 0),
        op(LOAD_8, R7, R6, 0, 0),
        op(LOAD_8, R3, R6, 8, 0),
        op(JUMP_IF, R3, 0, 13, MEMORY as i32),
        op(LOAD_HELD, R1, OF_MAP, 0, map.as_raw_fd()),
        0,
        op(JUMP_UNLESS, R3, 0, 2, MAP as i32),
        op(MOVE, R0, R1, 0, 0),
        op(JUMP, 0, 0, 15, 0),
        op(ADD, R3, 0, 0, -(VALUE as i32)),
        // The key is 0.
        op(SET, R0, 0, 0, 0),
        op(STORE_8, FRAME, R0, -8, 0),
        op(MOVE, R2, FRAME, 0, 0),
        op(ADD, R2, 0, 0, -8),
        op(CALL, 0, 0, 0, LOOKUP_PERCPU),
        op(JUMP_IF, R0, 0, 11, 0),
        op(JUMP, 0, 0, 7, 0),
        op(MOVE, R1, FRAME, 0, 0),
        op(ADD, R1, 0, 0, -8),
        op(SET, R2, 0, 0, 8),
        op(MOVE, R3, R7, 0, 0),
        op(CALL, 0, 0, 0, PROBE_READ_KERNEL),
        op(JUMP_UNLESS, R0, 0, 4, 0),
        op(LOAD_8, R0, FRAME, -8, 0),
        op(STORE_8, R6, R0, 0, 0),
        op(SET, R0, 0, 0, 0),
        op(EXIT, 0, 0, 0, 0),
        op(SET, R0, 0, 0, 1),
        op(EXIT, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_rings() {
        // 2 * 128 + 2 events do not fit two pages.
        assert_eq!(ring_size(128, 2), (12288, 383));
        assert_eq!(ring_size(1, 2), (4096, 127));
    }

    #[test]
    fn who_has_no_contexts_has_none() {
        let reader = Reader::new().unwrap();
        assert_eq!(reader.contexts(Pid::this()).unwrap(), []);
    }

    #[test]
    #[allow(unsafe_code, reason = "there is no other way to make a context")]
    fn contexts_are_read() {
        let mut id = 0u64;
        // SAFETY: the kernel writes the id; the context goes with the process.
        let done = unsafe { libc::syscall(libc::SYS_io_setup, 100, &raw mut id) };
        assert_eq!(done, 0);
        let (len, events) = ring_size(100, possible_cpus().unwrap().len());
        let context = Context {
            address: id,
            len,
            requests: 100,
            events,
            ..Context::default()
        };
        let reader = Reader::new().unwrap();
        assert_eq!(reader.contexts(Pid::this()).unwrap(), [context]);
    }

    #[test]
    #[allow(unsafe_code, reason = "there is no other way to make requests")]
    fn requests_under_way_are_counted_on_all_cpus() {
        use std::os::fd::AsRawFd;
        let (reader, writer) = nix::unistd::pipe().unwrap();
        // struct iocb: IOCB_CMD_POLL for POLLIN.
        let mut request = [0u64; 8];
        request[2] = 5 | (reader.as_raw_fd() as u64) << 32;
        request[3] = libc::POLLIN as u64;
        let requests: [_; 3] = std::array::from_fn(|_| Box::into_raw(Box::new(request)));
        let mut id = 0u64;
        // SAFETY: the kernel writes the id, and a key into the request, which is alive until all
        // have ended.
        let submitted = unsafe {
            libc::syscall(libc::SYS_io_setup, 100, &raw mut id);
            libc::syscall(libc::SYS_io_submit, id, 3, requests.as_ptr())
        };
        assert_eq!(submitted, 3);
        let reader = Reader::new().unwrap();
        let look = || reader.contexts(Pid::this()).unwrap()[0];
        let context = look();
        assert_eq!((context.under_way, context.tail), (3, 0));
        assert!(context.cancellable);
        // They end on whatever CPU.
        nix::unistd::write(&writer, b"x").unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while look().under_way > 0 && std::time::Instant::now() < until {
            std::thread::yield_now();
        }
        let context = look();
        assert_eq!((context.under_way, context.tail), (0, 3));
        assert!(!context.cancellable);
    }
}
