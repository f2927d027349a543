use freezeframe_engine::*;
struct P;
impl Events for P {
    fn log(&self, l: Level, t: std::fmt::Arguments<'_>) {
        eprintln!("{l:?}: {t}");
    }
    fn cancelled(&self) -> bool {
        false
    }
    fn phase(&self, p: freezeframe_error::Phase) {
        eprintln!("phase {p}");
    }
    fn progress(&self, _: u64, _: u64) {}
    fn step(&self, _: Step) -> freezeframe_error::Result<()> {
        Ok(())
    }
}
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let t = std::time::Instant::now();
    match a[1].as_str() {
        "dump" => {
            let r = dump::run(
                &DumpRequest {
                    pid: a[2].parse().unwrap(),
                    images_dir: a[3].clone().into(),
                    after: if a.len() > 4 { After::Run } else { After::Kill },
                    timeout: std::time::Duration::from_secs(10),
                    sync: true,
                    options: Default::default(),
                },
                &P,
            );
            eprintln!("{r:#?}");
            if r.is_err() {
                std::process::exit(1)
            }
        }
        _ => {
            let r = restore::run(
                &RestoreRequest {
                    images_dir: a[2].clone().into(),
                    sibling: true,
                    leave_stopped: false,
                    timeout: std::time::Duration::from_secs(10),
                    options: Default::default(),
                },
                &P,
            );
            eprintln!("{r:#?}");
            if r.is_err() {
                std::process::exit(1)
            }
        }
    }
    eprintln!("{:?}", t.elapsed());
}
