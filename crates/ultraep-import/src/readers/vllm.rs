//! vLLM MoE logger JSONL: a `meta` row, then one `route` row a (layer, token). Our minimal JSONL is the same with four keys:
//! `type`, `layer`, `token_idx`, `topk_ids`; a `meta` row may give `num_experts`, `top_k` and `model_id`.
//!
//! Every `meta` row is a start of the engine, which a piece's step counts. A row of another model is refused: a layer of two
//! models is none. Where the experts are known, an id beyond them is refused, and padding is told from it
//! ([`crate::choices`]); profiling runs are the watch's matter ([`crate::watch`]).

use std::borrow::Cow;
use std::path::Path;

use serde::Deserialize;
use ultraep_plan::MAX_EXPERTS;

use crate::choices::push_choices;
use crate::error::layer_id;
use crate::input::Lines;
use crate::{Format, ImportError, OpenOptions, Piece, Problem, Recording, RecordingInfo, Sources};

#[derive(Debug, Deserialize)]
struct Row<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(default)]
    layer: u64,
    #[serde(default)]
    topk_ids: Vec<i64>,
    top_k: Option<usize>,
    num_experts: Option<usize>,
    #[serde(borrow)]
    model_id: Option<Cow<'a, str>>,
}

struct VllmLogger {
    info: RecordingInfo,
    lines: Lines,
    starts: u64,
    rows: u64,
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn Recording>, ImportError> {
    let mut info = RecordingInfo::new(Format::VllmLogger, Sources::Tokens);
    let mut lines = Lines::open(path, &OpenOptions::default())?;
    if lines.advance()? {
        let refuse = |problem| lines.refuse(problem);
        let row: Row<'_> = serde_json::from_slice(lines.line()).map_err(|e| refuse(Problem::syntax(e)))?;
        info.top_k = row.top_k;
        info.experts = row.num_experts;
        if let Some(got) = row.num_experts.filter(|experts| !(1..=MAX_EXPERTS).contains(experts)) {
            let (got, max) = (got as u64, MAX_EXPERTS as u64);
            return Err(refuse(Problem::Limit { what: "num_experts, at least 1:", got, max }));
        }
        info.metadata.extend(row.model_id.map(|model| ("model".to_owned(), model.into_owned())));
    }
    info.experts = options.experts.or(info.experts);
    Ok(Box::new(VllmLogger { info, lines: Lines::open(path, options)?, starts: 0, rows: 0 }))
}

impl VllmLogger {
    /// A `meta` row: the engine started, with the same model as before.
    fn start(
        &mut self,
        model: Option<String>,
        (top_k, experts): (Option<usize>, Option<usize>),
    ) -> Result<(), ImportError> {
        self.starts += u64::from(self.rows > 0);
        let known = self.info.metadata.iter().find(|(key, _)| key == "model").map(|(_, model)| model);
        let differs = |what: &'static str, got: String, expected: String| {
            let expected = format!("{expected}, as before: two models are two recordings");
            Err(self.lines.refuse(Problem::differs(what, got, expected)))
        };
        if let (Some(got), Some(known)) = (&model, known)
            && got != known
        {
            return differs("model", got.chars().take(80).collect(), known.clone());
        }
        if let (Some(got), Some(known)) = (top_k, self.info.top_k)
            && got != known
        {
            return differs("top_k", got.to_string(), known.to_string());
        }
        if let (Some(got), Some(known)) = (experts, self.info.experts)
            && got > known
        {
            return differs("num_experts", got.to_string(), known.to_string());
        }
        Ok(())
    }
}

impl Recording for VllmLogger {
    fn info(&self) -> &RecordingInfo {
        &self.info
    }

    fn next(&mut self, piece: &mut Piece) -> Result<bool, ImportError> {
        while self.lines.advance()? {
            let Some(row) = self.lines.json::<Row<'_>>()? else { return Ok(false) };
            if row.kind == "meta" {
                let (model, told) = (row.model_id.map(Cow::into_owned), (row.top_k, row.num_experts));
                self.start(model, told)?;
                continue;
            }
            let refuse = |problem| self.lines.refuse(problem);
            if row.kind != "route" {
                let got = row.kind.chars().take(40).collect::<String>();
                return Err(refuse(Problem::differs("row type", got, "meta or route")));
            }
            (piece.step, piece.layer) = (self.starts, layer_id(row.layer).map_err(refuse)?);
            if row.topk_ids.is_empty() {
                return Err(refuse(Problem::Missing("topk_ids".to_owned())));
            }
            push_choices(&row.topk_ids, self.info.experts, piece.choices(row.topk_ids.len())).map_err(refuse)?;
            self.rows += 1;
            return Ok(true);
        }
        Ok(false)
    }

    fn ending(&self) -> Option<String> {
        self.lines.ending()
    }
}
