//! `man`: the manual page, in roff.

use std::io::Write;

use crate::grammar::{Line, Stop, Usage, command};
use crate::outcome;

/// Prints it; the exit code. One page for all actions.
pub(crate) fn run(_line: &Line) -> Result<i32, Stop> {
    let mut page = Vec::new();
    let command = command();
    let render = |page: &mut Vec<u8>| -> std::io::Result<()> {
        let man = clap_mangen::Man::new(command.clone())
            .section("8")
            .manual("freezeframe");
        man.render_title(page)?;
        man.render_name_section(page)?;
        man.render_synopsis_section(page)?;
        man.render_description_section(page)?;
        for sub in command.get_subcommands().filter(|s| !s.is_hide_set()) {
            let name = sub.get_name();
            writeln!(page, ".SH \"{}\"", name.to_uppercase())?;
            let man =
                clap_mangen::Man::new(sub.clone().display_name(format!("freezeframe {name}")));
            let mut part = Vec::new();
            man.render_synopsis_section(&mut part)?;
            man.render_description_section(&mut part)?;
            man.render_options_section(&mut part)?;
            let part = String::from_utf8_lossy(&part).replace(".SH ", ".SS ");
            page.write_all(part.as_bytes())?;
        }
        man.render_extra_section(page)
    };
    render(&mut page).map_err(|e| Usage(format!("the manual page cannot be made: {e}")))?;
    outcome::write(&String::from_utf8_lossy(&page));
    Ok(outcome::DONE)
}
