//! Maps and what they do with a load.

use ultraep_placement::{EMPTY, MapError, MapShape, PlacementMap, Sharing};

const SHAPE: MapShape = MapShape { layers: 1, ranks: 2, slots_per_rank: 2, experts: 3 };

#[test]
fn copies_share_evenly_and_the_source_axis_says_what_is_remote() {
    // Expert 0 on both ranks, 1 on rank 0, 2 on rank 1.
    let map = PlacementMap::new(SHAPE, vec![0, 1, 2, 0]).unwrap();
    let sharing = Sharing::of_counts(&map, 0, &[10, 4, 0, 20, 0, 6]).unwrap();
    assert_eq!(sharing.rank_loads, [19 * Sharing::UNIT, 21 * Sharing::UNIT]);
    assert!((sharing.imbalance() - 21.0 / 20.0).abs() < 1e-12);
    // Half of expert 0's tokens of either source leave it.
    assert_eq!(sharing.remote_tokens(), 15.0);
    assert_eq!(sharing.tokens, 40);
    let totals = Sharing::of_loads(&map, 0, &[30, 4, 6]).unwrap();
    assert_eq!((totals.rank_loads, totals.remote), (sharing.rank_loads, 0));
}

#[test]
fn an_expert_that_is_nowhere_may_have_no_tokens() {
    let map = PlacementMap::new(SHAPE, vec![0, 1, 1, EMPTY]).unwrap();
    assert!(Sharing::of_loads(&map, 0, &[1, 1, 1]).is_none());
    assert_eq!(Sharing::of_loads(&map, 0, &[0, 2, 0]).unwrap().rank_loads, [Sharing::UNIT; 2]);
    assert!(Sharing::of_loads(&map, 0, &[1, 1]).is_none(), "counts of another shape");
    assert_eq!(Sharing::of_loads(&map, 0, &[0, 0, 0]).unwrap().imbalance(), 1.0);
}

#[test]
fn wrong_numbers_are_refused_with_their_place() {
    let new = |entries: &[i32]| PlacementMap::new(SHAPE, entries.to_vec()).unwrap_err().to_string();
    assert_eq!(new(&[0, 1, 2]), "3 entries: 1 layers of 4 physical experts have 4");
    assert_eq!(new(&[0, 1, 2, 3]), "layer 0, rank 1, slot 1: expert 3: allowed are 0 to 2, and -1 for an empty slot");
    let shape = MapShape { ranks: 0, ..SHAPE };
    assert_eq!(PlacementMap::new(shape, vec![]).unwrap_err().to_string(), "ranks 0: allowed are 1 to 1024");
    let map = PlacementMap::new(SHAPE, vec![0, 1, 2, 0]).unwrap();
    assert_eq!(map.clone().with_layer_numbers(vec![1, 2]), Err(MapError::LayerNumbers { rows: 1 }));
    assert_eq!(map.with_layer_numbers(vec![7]).unwrap().layer_numbers(), Some(&[7][..]));
}
