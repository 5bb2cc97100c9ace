//! `--out` and `--for`: a placement as a file that an engine loads.

use std::io::Write;
use std::path::{Path, PathBuf};

use ultraep_placement::{MapFormat, PlacementMap, ReadHints, read, write};

use crate::error::{CliError, note};

/// Where a placement is written to, and for whom.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Placement for an engine (copies share tokens evenly there, and all experts may move)")]
pub(crate) struct PlacementArgs {
    /// Write one static placement for all of the load; the file must not exist
    #[arg(long, value_name = "FILE", requires = "engine")]
    pub(crate) out: Option<PathBuf>,
    /// Engine that loads the placement: sglang, vllm, vllm-ascend or trtllm
    #[arg(long = "for", value_name = "ENGINE", requires = "out")]
    engine: Option<MapFormat>,
    /// Layers of the model, those without experts too, where the engine wants a row for each (sglang)
    #[arg(long, value_name = "COUNT", requires = "out")]
    model_layers: Option<usize>,
}

impl PlacementArgs {
    /// Writes `map` where it was asked for, beside the file first, reads it back, and says how the engine takes it.
    pub(crate) fn save(&self, map: &PlacementMap, imbalance: &str) -> Result<(), CliError> {
        let (Some(path), Some(format)) = (&self.out, self.engine) else { return Ok(()) };
        let text = write(map, format, self.model_layers).map_err(CliError::input)?;
        let hints = ReadHints { ranks: Some(map.shape().ranks), experts: Some(map.shape().experts) };
        let (back, found) = read(&text, hints).map_err(CliError::failure)?;
        if found != format || !back.findings().is_valid() {
            return Err(CliError::Failure(format!("{}: it is not read back as written", path.display())));
        }
        create_whole(path, text.as_bytes())?;
        let shape = map.shape();
        note(format_args!(
            "{}: {} layers, {} ranks of {} slots, for {format}; {imbalance}",
            path.display(),
            back.shape().layers,
            shape.ranks,
            shape.slots_per_rank
        ));
        note(format.usage());
        Ok(())
    }
}

/// Creates a file that is whole or not there.
fn create_whole(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => CliError::Input(format!("{}: it exists already", path.display())),
        _ => CliError::Failure(format!("{}: {error}", path.display())),
    };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // As any file that is made here: what the umask leaves of it.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    let mut file = tempfile::Builder::new().permissions(mode).tempfile_in(folder).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.persist_noclobber(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// Reads a placement file.
pub(crate) fn read_map(path: &Path, hints: ReadHints) -> Result<(PlacementMap, MapFormat), CliError> {
    let name = path.display();
    let size = std::fs::metadata(path).map_err(|error| CliError::Input(format!("{name}: {error}")))?.len();
    if size > ultraep_placement::MAX_TEXT_BYTES as u64 {
        let most = ultraep_placement::MAX_TEXT_BYTES;
        return Err(CliError::Input(format!("{name}: {size} bytes: allowed are up to {most}")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| CliError::Input(format!("{name}: {error}")))?;
    read(&text, hints).map_err(|error| CliError::Input(format!("{name}: {error}")))
}
