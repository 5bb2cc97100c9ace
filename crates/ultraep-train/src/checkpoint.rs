//! Checkpoints: a folder that is complete or not there.
//!
//! ```text
//! step-00000060/
//!   checkpoint.json                    step, configuration, digest of the text, list of files    [`CheckpointInfo`]
//!   dense.safetensors                  dense parameters, their moments, router biases, loads that historical policies saw
//!   experts-00003-of-00016.safetensors masters of one rank and their moments, one tensor an expert
//! ```
//!
//! Replicas are not in it. Every rank writes its own experts into `step-N.partial`; when all are done rank 0 adds the
//! manifest and renames the folder; then the oldest checkpoints over [`TrainConfig::keep`] go. Every file carries a digest of its tensors, so damage is found before anything is
//! taken from it. Experts are found by name, so another number of ranks can read it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use ultraep_fabric::Operation;
use ultraep_model::ExpertParameters;
use xxhash_rust::xxh64::Xxh64;

use crate::optimizer::Moments;
use crate::worker::Worker;
use crate::{TrainConfig, TrainError};

/// Name and version of the manifest.
const SCHEMA: &str = "ultraep.checkpoint/1";
const MANIFEST: &str = "checkpoint.json";
pub(crate) const DENSE: &str = "dense.safetensors";
const DIGEST: &str = "digest";
/// Extension of the folder of a checkpoint that is being written.
const PARTIAL: &str = "partial";
/// Extension of the folder of a checkpoint that is being removed.
const REMOVED: &str = "removed";

/// `checkpoint.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Name and version.
    pub schema: String,
    /// Steps trained; training goes on with this one.
    pub step: u64,
    /// Configuration of the run that wrote it.
    pub config: TrainConfig,
    /// Digest of its text, 16 hexadecimal digits.
    pub text_digest: String,
    /// Files with experts: name, first expert, end.
    pub expert_files: Vec<(String, usize, usize)>,
}

pub(crate) fn refuse(path: &Path, reason: impl Into<String>) -> TrainError {
    TrainError::Checkpoint { path: path.to_path_buf(), reason: reason.into() }
}

/// Whether a name stays in its folder wherever it is read: one part of a path, neither `..` nor a drive nor a root.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let is_one_part = matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None));
    is_one_part && !name.contains(['/', '\\', ':', '\0'])
}

/// The folder of a checkpoint's step.
fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step of a checkpoint's folder; `None` of other names, as those of a folder that is being written or removed.
fn step_of(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_prefix("step-")?;
    let step = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??;
    (folder_name(step) == path.file_name()?.to_str()?).then_some(step)
}

/// Complete checkpoints in `folder`, earliest first.
fn complete_checkpoints(folder: &Path) -> std::io::Result<Vec<(u64, PathBuf)>> {
    let paths = fs::read_dir(folder)?.filter_map(Result::ok).map(|entry| entry.path());
    let complete = paths.filter(|path| path.join(MANIFEST).is_file());
    let mut all: Vec<_> = complete.filter_map(|path| step_of(&path).map(|step| (step, path))).collect();
    all.sort();
    Ok(all)
}

/// The checkpoint at `path`: a checkpoint's folder itself, or the latest one of a run folder.
pub fn find_checkpoint(path: &Path) -> Result<PathBuf, TrainError> {
    if path.join(MANIFEST).is_file() {
        return Ok(path.to_path_buf());
    }
    let all = path.join("checkpoints");
    let mut complete = match complete_checkpoints(&all) {
        Ok(complete) => complete,
        Err(_) if path.exists() => return Err(refuse(path, "neither a checkpoint nor a run folder that has one")),
        Err(error) => return Err(TrainError::file("read", path)(error)),
    };
    complete.pop().map(|(_, path)| path).ok_or_else(|| refuse(&all, "no complete checkpoint here"))
}

/// Removes all complete checkpoints in `folder` but the latest `keep` (at least one; 0 keeps all), and what earlier removals
/// and saves left unfinished. A checkpoint that goes loses its name first, so that half of one is never taken for one.
///
/// What cannot be removed stays: it is tried again after the next save, and a full disk is told by that.
fn prune(folder: &Path, keep: usize) {
    let Ok(complete) = complete_checkpoints(folder) else { return };
    let surplus = if keep == 0 { 0 } else { complete.len().saturating_sub(keep) };
    for (_, path) in &complete[..surplus] {
        let _ = fs::rename(path, path.with_extension(REMOVED));
    }
    for path in fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path()) {
        let unfinished = path.extension().is_some_and(|e| e == REMOVED || e == PARTIAL);
        if unfinished && step_of(&path.with_extension("")).is_some() {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

impl CheckpointInfo {
    /// Reads the manifest of a checkpoint.
    pub fn read(path: &Path) -> Result<Self, TrainError> {
        let file = path.join(MANIFEST);
        let text = fs::read(&file).map_err(TrainError::file("read", &file))?;
        let info: Self = serde_json::from_slice(&text).map_err(|error| refuse(&file, error.to_string()))?;
        if info.schema != SCHEMA {
            return Err(refuse(&file, format!("schema {:?}, this program reads {SCHEMA:?}", info.schema)));
        }
        if let Some((name, ..)) = info.expert_files.iter().find(|(name, ..)| !is_plain_name(name)) {
            return Err(refuse(&file, format!("file {name:?}: allowed are names of files in the checkpoint's folder")));
        }
        info.config.validate_sizes().map_err(|error| refuse(&file, error.to_string()))?;
        let experts = info.config.experts;
        if let Some((name, first, end)) = info.expert_files.iter().find(|(_, first, end)| first > end || *end > experts)
        {
            return Err(refuse(&file, format!("{name} is said to have experts {first} to {end} of {experts}")));
        }
        Ok(info)
    }

    /// Refuses a checkpoint of another model or another text: to go on from it would be another training.
    pub fn check_against(&self, config: &TrainConfig, text_digest: u64, path: &Path) -> Result<(), TrainError> {
        self.check_model(config, path)?;
        self.check_text(text_digest, path)
    }

    pub(crate) fn check_model(&self, config: &TrainConfig, path: &Path) -> Result<(), TrainError> {
        let (ours, theirs) = (model_fields(config), model_fields(&self.config));
        match ours.into_iter().zip(theirs).find(|(a, b)| a != b) {
            Some((ours, theirs)) => Err(refuse(path, format!("{} is {} there, {} here", ours.0, theirs.1, ours.1))),
            None => Ok(()),
        }
    }

    pub(crate) fn check_text(&self, text_digest: u64, path: &Path) -> Result<(), TrainError> {
        let ours = format!("{text_digest:016x}");
        if ours != self.text_digest {
            let reason = format!("it was trained on other text (digest {}, here {ours})", self.text_digest);
            return Err(refuse(path, reason));
        }
        Ok(())
    }
}

fn model_fields(config: &TrainConfig) -> [(&'static str, String); 9] {
    [
        ("hidden", config.hidden.to_string()),
        ("heads", config.heads.to_string()),
        ("layers", config.layers.to_string()),
        ("experts", config.experts.to_string()),
        ("top-k", config.top_k.to_string()),
        ("intermediate", config.intermediate.to_string()),
        ("sequence tokens", config.sequence_tokens.to_string()),
        ("router", format!("{:?}", config.router)),
        ("seed", config.seed.to_string()),
    ]
}

/// A named run of numbers.
type Named<'a> = (String, &'a [f32]);

fn write_tensors(path: &Path, mut tensors: Vec<Named<'_>>) -> Result<(), TrainError> {
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let metadata = HashMap::from([(DIGEST.to_string(), digest(tensors.iter().map(|(n, v)| (n.as_str(), bytes(v)))))]);
    let views = tensors.iter().map(|(name, values)| {
        let view = TensorView::new(Dtype::F32, vec![values.len()], bytes(values));
        view.map(|view| (name.clone(), view)).map_err(|error| refuse(path, error.to_string()))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    // The library writes beside and renames, which leaves files for the owner alone: the mode is that of a file made here.
    let mode = fs::File::create(path).and_then(|file| file.metadata()).map_err(TrainError::file("create", path))?;
    let written = safetensors::serialize_to_file(views, Some(metadata), path);
    written.map_err(|error| match error {
        safetensors::SafeTensorError::IoError(error) => TrainError::file("write", path)(error),
        other => refuse(path, other.to_string()),
    })?;
    let file = fs::File::open(path).map_err(TrainError::file("open", path))?;
    file.set_permissions(mode.permissions()).and_then(|()| file.sync_all()).map_err(TrainError::file("write", path))
}

/// Waits until the disk has a folder's list of files.
fn sync_folder(path: &Path) -> Result<(), TrainError> {
    let folder = fs::File::open(path).map_err(TrainError::file("open", path))?;
    folder.sync_all().map_err(TrainError::file("write", path))
}

fn bytes(values: &[f32]) -> &[u8] {
    bytemuck::cast_slice(values)
}

/// Digest of tensors in order of name, over names, lengths and bytes.
fn digest<'a>(tensors: impl Iterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut hash = Xxh64::new(0);
    for (name, bytes) in tensors {
        hash.update(name.as_bytes());
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    format!("{:016x}", hash.digest())
}

/// A file of tensors whose digest was checked.
pub(crate) struct TensorFile {
    path: PathBuf,
    tensors: HashMap<String, Vec<f32>>,
}

impl TensorFile {
    pub(crate) fn read(path: PathBuf) -> Result<Self, TrainError> {
        let data = fs::read(&path).map_err(TrainError::file("read", &path))?;
        let file = SafeTensors::deserialize(&data).map_err(|error| refuse(&path, format!("damaged: {error}")))?;
        let (_, metadata) =
            SafeTensors::read_metadata(&data).map_err(|error| refuse(&path, format!("damaged: {error}")))?;
        let mut all = file.tensors();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let found = digest(all.iter().map(|(name, view)| (name.as_str(), view.data())));
        let stated = metadata.metadata().as_ref().and_then(|m| m.get(DIGEST));
        if stated != Some(&found) {
            return Err(refuse(&path, "damaged: its content does not match its digest"));
        }
        let floats = |view: &TensorView<'_>| {
            let chunks = view.data().chunks_exact(4);
            chunks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        let tensors = all.iter().map(|(name, view)| (name.clone(), floats(view))).collect();
        Ok(Self { path, tensors })
    }

    pub(crate) fn copy(&self, name: &str, into: &mut [f32]) -> Result<(), TrainError> {
        let values = self.tensors.get(name).ok_or_else(|| refuse(&self.path, format!("has no tensor {name}")))?;
        if values.len() != into.len() {
            let reason = format!("{name} has {} elements, the model {}", values.len(), into.len());
            return Err(refuse(&self.path, reason));
        }
        into.copy_from_slice(values);
        Ok(())
    }
}

/// Names of a parameter's value and moments.
pub(crate) fn names(name: &str) -> [String; 3] {
    [name.to_string(), format!("adam.first.{name}"), format!("adam.second.{name}")]
}

fn observed_name(layer: usize) -> String {
    format!("layers.{layer}.moe.observed")
}

pub(crate) fn bias_name(layer: usize) -> String {
    format!("layers.{layer}.moe.router.bias")
}

impl Worker {
    /// Saves the state after `step` steps below `folder`; all ranks together. Gives the checkpoint's folder.
    pub(crate) fn save(&self, folder: &Path, step: u64, text_digest: u64) -> Result<PathBuf, TrainError> {
        let partial = folder.join(folder_name(step)).with_extension(PARTIAL);
        let rank = self.experts.lock().manager.rank().index();
        let saved = self.save_through(&partial, folder, step, text_digest);
        if saved.is_err() && rank == 0 {
            // The disk may be full: make room again. The error that counts is the one at hand.
            let _ = fs::remove_dir_all(&partial);
        }
        saved
    }

    fn save_through(&self, partial: &Path, folder: &Path, step: u64, text_digest: u64) -> Result<PathBuf, TrainError> {
        let done = folder.join(folder_name(step));
        let rank = self.experts.lock().manager.rank().index();
        if rank == 0 {
            match fs::remove_dir_all(partial) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(TrainError::file("remove", partial)(error));
                }
                _ => {}
            }
            fs::create_dir_all(partial).map_err(TrainError::file("create", partial))?;
        }
        self.barrier()?;
        self.write_experts(partial)?;
        if rank == 0 {
            self.write_dense(&partial.join(DENSE))?;
        }
        self.barrier()?;
        if rank == 0 {
            self.write_manifest(partial, step, text_digest)?;
            sync_folder(partial)?;
            if done.exists() {
                // Of an earlier run in this folder. It goes when the new one is in its place.
                let aside = done.with_extension(REMOVED);
                let _ = fs::remove_dir_all(&aside); // of a process that was killed here
                fs::rename(&done, aside).map_err(TrainError::file("replace", &done))?;
            }
            fs::rename(partial, &done).map_err(TrainError::file("rename", partial))?;
            sync_folder(folder)?;
            prune(folder, self.config.keep);
        }
        self.barrier()?;
        Ok(done)
    }

    fn barrier(&self) -> Result<(), TrainError> {
        let mut experts = self.experts.lock();
        experts.endpoint.fabric().run(Operation::Barrier)?;
        Ok(())
    }

    fn expert_file(&self, rank: usize) -> String {
        format!("experts-{rank:05}-of-{:05}.safetensors", self.config.ranks)
    }

    fn write_dense(&self, path: &Path) -> Result<(), TrainError> {
        let mut tensors = Vec::new();
        let mut at = 0;
        for parameter in self.parameters.all() {
            let range = at..at + parameter.var.elem_count();
            at = range.end;
            let values = [&self.dense, &self.dense_moments.first, &self.dense_moments.second];
            for (name, values) in names(&parameter.name).into_iter().zip(values) {
                tensors.push((name, &values[range.clone()]));
            }
        }
        let experts = self.experts.lock();
        // Counts are whole numbers, exact in `f32` up to 2^24 tokens of an expert in a microbatch.
        let observed = |layer| experts.manager.observed(layer).iter().map(|&load| load as f32).collect();
        let observed: Vec<Vec<f32>> = (0..self.config.layers).map(observed).collect();
        let seen = observed.iter().enumerate().filter(|(_, loads)| !loads.is_empty());
        tensors.extend(seen.map(|(layer, loads)| (observed_name(layer), &loads[..])));
        let biases = self.model.moe_layers().enumerate().map(|(layer, moe)| (bias_name(layer), moe.router().bias()));
        tensors.extend(biases);
        write_tensors(path, tensors)
    }

    fn write_experts(&self, folder: &Path) -> Result<(), TrainError> {
        let experts = self.experts.lock();
        let (rank, config) = (experts.manager.rank(), experts.manager.config());
        let (own, len) = (config.topology.masters(rank), config.shape.weight_len());
        let weights = (0..config.layers).map(|layer| experts.manager.masters(layer).weights.read::<f32>());
        let weights = weights.collect::<Result<Vec<_>, _>>()?;
        let mut tensors = Vec::new();
        for (layer, (weights, moments)) in weights.iter().zip(&self.expert_moments).enumerate() {
            for (i, expert) in own.clone().enumerate() {
                let values = [&weights[..], &moments.first, &moments.second];
                for (name, values) in names(&ExpertParameters::name(layer, expert)).into_iter().zip(values) {
                    tensors.push((name, &values[i * len..(i + 1) * len]));
                }
            }
        }
        write_tensors(&folder.join(self.expert_file(rank.index())), tensors)
    }

    fn write_manifest(&self, folder: &Path, step: u64, text_digest: u64) -> Result<(), TrainError> {
        let topology = self.config.topology()?;
        let file = |rank| {
            let own = topology.masters(ultraep_plan::Rank::new(rank));
            (self.expert_file(rank), own.start, own.end)
        };
        let info = CheckpointInfo {
            schema: SCHEMA.to_string(),
            step,
            config: self.config.clone(),
            text_digest: format!("{text_digest:016x}"),
            expert_files: (0..topology.ranks()).map(file).collect(),
        };
        let text = serde_json::to_vec_pretty(&info).map_err(|error| TrainError::Encode(error.to_string()))?;
        Ok(ultraep_run::write_atomically(&folder.join(MANIFEST), &text)?)
    }

    /// Takes the state of the checkpoint at `path`; every rank reads what it needs.
    pub(crate) fn load(&mut self, path: &Path, info: &CheckpointInfo) -> Result<(), TrainError> {
        let file = TensorFile::read(path.join(DENSE))?;
        let mut at = 0;
        for parameter in self.parameters.all() {
            let range = at..at + parameter.var.elem_count();
            at = range.end;
            let [value, first, second] = names(&parameter.name);
            file.copy(&value, &mut self.dense[range.clone()])?;
            file.copy(&first, &mut self.dense_moments.first[range.clone()])?;
            file.copy(&second, &mut self.dense_moments.second[range])?;
        }
        let mut bias = vec![0.0; self.config.experts];
        for (layer, moe) in self.model.moe_layers_mut().enumerate() {
            file.copy(&bias_name(layer), &mut bias)?;
            moe.router_mut().set_bias(&bias)?;
        }
        for layer in 0..self.config.layers {
            // Not there when no policy of that run was historical.
            if let Some(loads) = file.tensors.get(&observed_name(layer)) {
                let loads: Vec<u32> = loads.iter().map(|&load| load as u32).collect();
                self.experts.lock().manager.replay(layer, &loads)?;
            }
        }
        self.publish_dense()?;
        self.load_experts(path, info)
    }

    fn load_experts(&mut self, path: &Path, info: &CheckpointInfo) -> Result<(), TrainError> {
        let experts = self.experts.lock();
        let config = experts.manager.config();
        let (own, len) = (config.topology.masters(experts.manager.rank()), config.shape.weight_len());
        let mut missing = own.len();
        for (name, first, end) in &info.expert_files {
            let shared = own.start.max(*first)..own.end.min(*end);
            if shared.is_empty() {
                continue;
            }
            let file = TensorFile::read(path.join(name))?;
            missing = missing.saturating_sub(shared.len());
            for (layer, Moments { first, second }) in self.expert_moments.iter_mut().enumerate() {
                let mut weights = experts.manager.masters(layer).weights.write::<f32>()?;
                for expert in shared.clone() {
                    let at = (expert - own.start) * len..(expert - own.start + 1) * len;
                    let [value, name_first, name_second] = names(&ExpertParameters::name(layer, expert));
                    file.copy(&value, &mut weights[at.clone()])?;
                    file.copy(&name_first, &mut first[at.clone()])?;
                    file.copy(&name_second, &mut second[at])?;
                }
            }
        }
        if missing > 0 {
            return Err(refuse(path, format!("{missing} of this rank's experts are in none of its files")));
        }
        Ok(())
    }
}
