//! The `ultraep` command.
fn main() {
    eprintln!("ultraep: no command is built yet");
    std::process::exit(2);
}
