//! The advice in words: one page that can be forwarded, and the commands that give every number in it again.

use crate::{Advice, Typical};

/// What the advice is about, in the words of the command line.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The recording as the user named it, with the options that read it.
    pub recording: String,
    /// Name of the model.
    pub model: String,
    /// MoE layers of the model.
    pub layers: u64,
    /// Name of the hardware.
    pub hardware: String,
    /// Options that make predicted times: `--hardware H --hidden X --expert-width Y`.
    pub options: String,
    /// Slots that were tried, as a list of the command line.
    pub slots: String,
    /// Domains that were tried, as a list of the command line.
    pub domains: String,
    /// The typical microbatch.
    pub typical: Typical,
}

/// Paragraphs and commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// One line above all.
    pub title: String,
    /// What to know, a paragraph a question.
    pub paragraphs: Vec<String>,
    /// Commands that give the numbers again: what for, and the command.
    pub commands: Vec<(&'static str, String)>,
}

impl Page {
    /// Of an advice.
    pub fn of(advice: &Advice, subject: &Subject) -> Self {
        let paragraphs = vec![
            what_to_do(advice),
            what_it_is_now(advice),
            what_it_costs(advice, subject),
            when_it_pays(subject),
            which_layers(advice),
            why_exact(advice),
        ];
        let title = format!("{}: {} on {}, EP{}", subject.recording, subject.model, subject.hardware, advice.ranks);
        Self { title, paragraphs, commands: commands(advice, subject) }
    }
}

fn time(ns: f64) -> String {
    match ns {
        ns if ns < 1e6 => format!("{:.1} us", ns / 1e3),
        ns => format!("{:.2} ms", ns / 1e6),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

fn mib(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 30 => format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)),
        bytes => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
    }
}

fn slots(count: usize) -> String {
    if count == 1 { "1 slot".to_owned() } else { format!("{count} slots") }
}

fn what_to_do(advice: &Advice) -> String {
    let (offer, wanted) = (advice.offer(), percent(advice.within));
    let group = format!("{} a rank in domains of {} ranks", slots(offer.slots_per_rank), offer.domain);
    let reach = format!(
        "{} of ideal ({} a layer, ideal routing {})",
        percent(offer.share_of_ideal),
        time(offer.predicted_ns_mean),
        time(advice.ideal.predicted_ns_mean)
    );
    match (advice.is_reached, offer.speedup > 1.0) {
        (true, true) => format!("Do: {group}. The least that was tried and reaches {wanted}: {reach}."),
        (true, false) => format!(
            "Do nothing: without balancing a layer takes {}; {group} reach {reach} and are no faster. The load is even \
             enough, or too small for copies of experts to pay.",
            time(advice.none.predicted_ns_mean)
        ),
        (false, true) => format!("Nothing that was tried reaches {wanted}. The best is {group}: {reach}."),
        (false, false) => format!(
            "Do nothing: nothing that was tried reaches {wanted}, and the best, {group}, is no faster than no balancing \
             ({reach}; without {}).",
            time(advice.none.predicted_ns_mean)
        ),
    }
}

fn what_it_is_now(advice: &Advice) -> String {
    let (none, offer) = (&advice.none, advice.offer());
    format!(
        "Now: the busiest rank has {:.3} times the mean load on average and {:.3} times at worst; a layer's forward waits for \
         it and takes {}. Balanced: {:.3} and {:.3}, {}, that is {:.2} times as fast.",
        none.imbalance_mean,
        none.imbalance_worst,
        time(none.predicted_ns_mean),
        offer.imbalance_mean,
        offer.imbalance_worst,
        time(offer.predicted_ns_mean),
        offer.speedup
    )
}

fn what_it_costs(advice: &Advice, subject: &Subject) -> String {
    let (none, offer) = (&advice.none, advice.offer());
    let bytes = offer.slot_bytes_per_rank;
    let saved = none.predicted_ns_mean - offer.predicted_ns_mean;
    format!(
        "Memory: {} hold {} a rank, once for all {} layers (bf16 weights; training adds {} of f32 gradients). An engine that \
         keeps copies in every layer pays {}. For it a layer's forward gets {} shorter.",
        slots(offer.slots_per_rank),
        mib(bytes),
        subject.layers,
        mib(2 * bytes),
        mib(bytes * subject.layers),
        if saved > 0.0 { time(saved) } else { "no time".to_owned() }
    )
}

fn when_it_pays(subject: &Subject) -> String {
    let Typical { layer, step, microbatch, tokens_per_rank, pays_from } = subject.typical;
    let place = format!("layer {layer} (step {step}, microbatch {microbatch}, {tokens_per_rank} routed tokens a rank)");
    match pays_from {
        Some(tokens) => format!(
            "Break-even: for a load of the form of {place}, which is in the middle of all layers, balancing pays from about \
             {tokens} routed tokens a rank."
        ),
        None => format!("Break-even: for a load of the form of {place}, balancing pays at no size."),
    }
}

fn which_layers(advice: &Advice) -> String {
    let shown: Vec<String> =
        advice.layers.iter().take(5).map(|l| format!("{} ({:.3} to {:.3})", l.layer, l.none, l.balanced)).collect();
    let least = advice.layers.last().map_or_else(String::new, |l| format!("; least layer {} ({:.3})", l.layer, l.none));
    format!("Layers that need it most: {}{least}.", shown.join(", "))
}

fn why_exact(advice: &Advice) -> String {
    let (history, offer) = (&advice.history, advice.offer());
    format!(
        "Exact against history: eplb, placed from the microbatch before in the same slots, leaves {:.3} on average and {:.3} at \
         worst and reaches {} of ideal; the exact load reaches {}.",
        history.imbalance_mean,
        history.imbalance_worst,
        percent(history.share_of_ideal),
        percent(offer.share_of_ideal)
    )
}

fn commands(advice: &Advice, subject: &Subject) -> Vec<(&'static str, String)> {
    let Subject { recording, options, slots, domains, typical, .. } = subject;
    let (ranks, offer) = (advice.ranks, advice.offer());
    let group = format!("--ranks {ranks} --slots {} --domain {}", offer.slots_per_rank, offer.domain);
    let Typical { step, microbatch, layer, .. } = typical;
    vec![
        (
            "the table, now and balanced, exact against history",
            format!(
                "ultraep replay {recording} --ranks {ranks} --slots {slots} --domain {domains} --policies none,eplb,ultraep,ideal \
                 {options}"
            ),
        ),
        (
            "layers",
            format!("ultraep replay {recording} {group} --policies none,ultraep {options} --layers all --sort none"),
        ),
        (
            "break-even",
            format!(
                "ultraep replay {recording} --only {step}/{microbatch}/{layer} {group} --policies none,ultraep {options}"
            ),
        ),
    ]
}
