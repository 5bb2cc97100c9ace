//! Ranks that disagree about counts or plans: damaged tables are refused before anything is planned, and what passes for a
//! table is caught by the digest that checked mode compares, before a row moves.

use std::sync::{Arc, Mutex};

use crate::common::{Batch, TOKENS, TOP_K, batch, config, group, runtime};
use proptest::prelude::*;
use ultraep_fabric::stream::Direct;
use ultraep_fabric::{Capabilities, Completion, Fabric, FabricError, Operation, Region, Ticket, WindowId, run_threads};
use ultraep_plan::{ProblemError, Rank, UltraepParams};
use ultraep_runtime::{Pass, Recompute, Routing, RuntimeConfig, RuntimeError, VirtualLayer};

const RANKS: usize = 3;
const EXPERTS: usize = 5;
/// Words of a gathered row: a count for each expert, and their sum.
const ROW: usize = EXPERTS + 1;
const VICTIM: Rank = Rank::new(1);
const AT: VirtualLayer = VirtualLayer { layer: 0, microbatch: 0 };

/// Alters a gathered table, `[RANKS, ROW]`.
type Edit = Arc<dyn Fn(&mut [u32]) + Send + Sync>;

/// A fabric on which the table of counts is altered once it has been gathered.
struct Tampered {
    inner: Box<dyn Fabric>,
    edit: Edit,
    gathering: Option<(u64, Region)>,
}

impl Fabric for Tampered {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn ranks(&self) -> usize {
        self.inner.ranks()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn window(&self, id: WindowId) -> Option<Region> {
        self.inner.window(id)
    }

    fn submit_stamped(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        let table = match &operation {
            Operation::AllGather { recv, .. } if recv.bytes == RANKS * ROW * 4 => Some(recv.region.clone()),
            _ => None,
        };
        let ticket = self.inner.submit_stamped(operation, stamp)?;
        if let Some(table) = table {
            self.gathering = Some((ticket.id(), table));
        }
        Ok(ticket)
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<Completion>, FabricError> {
        self.inner.poll(ticket)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Completion, FabricError> {
        let id = ticket.id();
        let completion = self.inner.wait(ticket)?;
        if let Some((_, table)) = self.gathering.take_if(|(gathering, _)| *gathering == id) {
            (self.edit)(&mut table.write::<u32>().expect("gathered and not yet read"));
        }
        Ok(completion)
    }

    fn direct(&mut self) -> Option<&mut dyn Direct> {
        self.inner.direct()
    }

    fn leave(self: Box<Self>) -> Result<(), FabricError> {
        self.inner.leave()
    }
}

fn honest() -> RuntimeConfig {
    config(RANKS, EXPERTS, 1, 1)
}

/// One forward in which the victim has a configuration of its own and its table altered: each rank's error, `[RANKS]`.
fn forward(victims: RuntimeConfig, edit: Edit) -> Vec<Option<RuntimeError>> {
    let errors = Mutex::new(Vec::from([const { None::<RuntimeError> }; RANKS]));
    let result = run_threads(&group(&honest()), |fabric| -> Result<(), String> {
        let rank = fabric.rank();
        let (config, fabric) = if rank == VICTIM {
            let tampered = Tampered { inner: fabric, edit: Arc::clone(&edit), gathering: None };
            (victims.clone(), Box::new(tampered) as Box<dyn Fabric>)
        } else {
            (honest(), fabric)
        };
        let mut moe = runtime(config, fabric).map_err(|error| error.to_string())?;
        let Batch { x, gates, chosen, .. } = batch(rank.index(), EXPERTS, AT);
        let mut y = vec![0.0; x.len()];
        let routing = Routing { experts: &chosen, gates: &gates };
        let result = moe.forward(AT, Pass::Train(Recompute::Nothing), routing, &x, &mut y);
        let text = result.as_ref().map_err(RuntimeError::to_string).copied();
        errors.lock().expect("no rank panics while it reports")[rank.index()] = result.err();
        text?;
        moe.into_endpoint().leave().map_err(|error| error.to_string())
    });
    let errors = errors.into_inner().expect("as above");
    assert_eq!(result.is_ok(), errors.iter().all(Option::is_none), "{result:?}");
    errors
}

fn untouched() -> Edit {
    Arc::new(|_| {})
}

/// The table that the ranks of this test gather.
fn table() -> Vec<u32> {
    let mut table = Vec::new();
    for rank in 0..RANKS {
        let mut row = vec![0; ROW];
        let chosen = batch(rank, EXPERTS, AT).chosen;
        chosen.iter().for_each(|&expert| row[expert as usize] += 1);
        row[EXPERTS] = chosen.len() as u32;
        table.extend(row);
    }
    table
}

/// That the other ranks name the victim.
fn others_name_the_victim(errors: &[Option<RuntimeError>]) -> Result<(), String> {
    for (rank, error) in errors.iter().enumerate().filter(|&(rank, _)| rank != VICTIM.index()) {
        match error {
            Some(RuntimeError::Fabric(error)) if error.culprit() == Some(VICTIM) => {}
            other => return Err(format!("rank {rank}: {other:?}")),
        }
    }
    Ok(())
}

#[test]
fn without_an_edit_nothing_is_refused() {
    assert!(forward(honest(), untouched()).iter().all(Option::is_none));
}

/// Every bit of the table, one at a time. A flipped count makes its row's sum wrong, a flipped sum its row; what is too
/// large for any batch is refused for its size. So the rank with the damaged table never plans, whichever bit it is, and
/// checked mode is not needed for it.
#[test]
fn a_flipped_bit_of_the_table_is_always_refused_before_planning() {
    let unchecked = RuntimeConfig { checked: false, ..honest() };
    for word in 0..RANKS * ROW {
        for bit in 0..32 {
            let flip: Edit = Arc::new(move |table| table[word] ^= 1 << bit);
            let errors = forward(unchecked.clone(), flip);
            let refused = match &errors[VICTIM.index()] {
                Some(RuntimeError::Counts { at, source: ProblemError::RowSum { rank, .. } }) => {
                    *at == AT && *rank == word / ROW
                }
                Some(RuntimeError::Counts { at, source: ProblemError::TooManyTokens(_) }) => {
                    *at == AT && bit >= 28 && word % ROW != EXPERTS
                }
                _ => false,
            };
            assert!(refused, "bit {bit} of word {word}: {:?}", errors[VICTIM.index()]);
            others_name_the_victim(&errors).unwrap_or_else(|why| panic!("bit {bit} of word {word}: {why}"));
        }
    }
}

/// A table that another policy parameter makes another plan of.
#[test]
fn a_rank_with_another_parameter_is_named() {
    let mut other = honest();
    let params = UltraepParams { min_quota: 20, ..UltraepParams::default() };
    other.policies = vec![Arc::new(params)];
    named_by_digest(&forward(other, untouched())).unwrap_or_else(|why| panic!("{why}"));
}

/// Every rank refuses, and those that agree name the one that differs.
fn named_by_digest(errors: &[Option<RuntimeError>]) -> Result<(), String> {
    for (rank, error) in errors.iter().enumerate() {
        match error {
            Some(RuntimeError::DigestMismatch { at, rank: differs, ours, theirs }) => {
                let right = rank == VICTIM.index() || *differs == VICTIM.index();
                if *at != AT || ours == theirs || !right {
                    return Err(format!("rank {rank}: {error:?}"));
                }
            }
            // It had compared nothing yet when another rank did.
            Some(RuntimeError::Fabric(error)) if error.ends_group() => {}
            other => return Err(format!("rank {rank}: {other:?}")),
        }
    }
    let by_digest = |error: &&Option<RuntimeError>| matches!(error, Some(RuntimeError::DigestMismatch { .. }));
    match errors.iter().find(by_digest) {
        Some(_) => Ok(()),
        None => Err(format!("nobody compared digests: {errors:?}")),
    }
}

/// Moves one token of a row from an expert to another, if there is one: every row's sum stays right.
fn move_token(table: &mut [u32], row: usize, from: usize, to: usize) {
    let [from, to] = [from, to].map(|expert| row * ROW + expert);
    if table[from] > 0 {
        table[from] -= 1;
        table[to] += 1;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// What passes the sums (tokens moved within rows, even so that every expert's load stays the same) is caught by the
    /// digest of counts and plan.
    #[test]
    fn moved_tokens_are_caught_by_the_digest(
        moves in prop::collection::vec((0..RANKS, 0..EXPERTS, 0..EXPERTS), 1..4),
        keep_loads in any::<bool>(),
    ) {
        let edit = move |table: &mut [u32]| {
            for &(row, from, to) in &moves {
                move_token(table, row, from, to);
                if keep_loads {
                    // The next row moves one back, so that sums over sources are as before.
                    move_token(table, (row + 1) % RANKS, to, from);
                }
            }
        };
        let mut edited = table();
        edit(&mut edited);
        let errors = forward(honest(), Arc::new(edit));
        if edited == table() {
            prop_assert!(errors.iter().all(Option::is_none));
        } else {
            prop_assert_eq!(named_by_digest(&errors), Ok(()));
        }
    }

    /// An expert that does not exist, wherever it is chosen: the rank is refused before it exchanges anything, so the group
    /// goes on when it chooses again.
    #[test]
    fn an_expert_that_does_not_exist_is_refused_before_anything_is_exchanged(
        place in 0..TOKENS * TOP_K,
        expert in prop_oneof![Just(EXPERTS as u32), Just(u32::MAX), EXPERTS as u32..],
    ) {
        let outputs = |wrong: bool| run_threads(&group(&honest()), |fabric| {
            let rank = fabric.rank();
            let mut moe = runtime(honest(), fabric)?;
            let Batch { x, gates, mut chosen, .. } = batch(rank.index(), EXPERTS, AT);
            let mut y = vec![0.0; x.len()];
            let pass = Pass::Train(Recompute::Nothing);
            if wrong && rank == VICTIM {
                let right = std::mem::replace(&mut chosen[place], expert);
                let refused = moe.forward(AT, pass, Routing { experts: &chosen, gates: &gates }, &x, &mut y);
                let named = matches!(
                    refused,
                    Err(RuntimeError::Expert { token, expert: named, experts: EXPERTS })
                        if (token, named) == (place / TOP_K, expert)
                );
                assert!(named, "{refused:?}");
                chosen[place] = right;
            }
            moe.forward(AT, pass, Routing { experts: &chosen, gates: &gates }, &x, &mut y)?;
            moe.into_endpoint().leave()?;
            Ok::<_, RuntimeError>(y)
        });
        let (refused, plain) = (outputs(true), outputs(false));
        prop_assert_eq!(refused.map_err(|error| error.to_string()), plain.map_err(|error| error.to_string()));
    }
}
