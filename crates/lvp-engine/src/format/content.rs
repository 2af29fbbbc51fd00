//! The digest of what a target holds, taken while it is written: see [`ContentDigest`] for what it is made of.
//!
//! Workers hash their chunks themselves and hand in the digests with the chunk's turn; they are joined in the order of
//! turns, so that little is kept. It leaves out reading a target again.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use lvp_api::ContentDigest;

pub use crate::zero::is_zero;

/// The digest of one piece that is not all zero, and its number.
pub type Leaf = (u64, blake3::Hash);

const PIECE: usize = ContentDigest::PIECE as usize;

/// The running digest of one target.
#[derive(Default)]
pub struct ContentHasher {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    early: BTreeMap<u64, Vec<Leaf>>,
    hasher: blake3::Hasher,
}

impl ContentHasher {
    /// The pieces of a chunk; every turn from 0 on must come once.
    pub fn put(&self, turn: u64, leaves: Vec<Leaf>) {
        let state = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.early.insert(turn, leaves);
        while let Some(leaves) = state.early.remove(&state.next) {
            state.next += 1;
            for (number, hash) in leaves {
                state.hasher.update(&number.to_le_bytes());
                state.hasher.update(hash.as_bytes());
            }
        }
    }

    /// The digest, when all turns have come.
    pub fn finish(self) -> ContentDigest {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        ContentDigest::from_bytes(state.hasher.finalize().as_bytes())
    }
}

/// The pieces of a chunk that begins at `offset`, a multiple of a piece. A short one at the end of a target counts as if
/// zeros followed.
pub fn leaves(chunk: &[u8], offset: u64) -> Vec<Leaf> {
    let first = offset / ContentDigest::PIECE;
    let hashed = (first..).zip(chunk.chunks(PIECE)).filter(|(_, piece)| !is_zero(piece));
    hashed.map(|(number, piece)| (number, hash(piece))).collect()
}

fn hash(piece: &[u8]) -> blake3::Hash {
    if piece.len() == PIECE {
        return blake3::hash(piece);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(piece);
    hasher.update(&vec![0; PIECE - piece.len()]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(content: &[u8], turns: &[u64]) -> ContentDigest {
        let hasher = ContentHasher::default();
        for turn in turns {
            let from = (*turn as usize * 2 * PIECE).min(content.len());
            let chunk = &content[from..content.len().min(from + 2 * PIECE)];
            hasher.put(*turn, leaves(chunk, from as u64));
        }
        hasher.finish()
    }

    #[test]
    fn neither_order_nor_zeros_behind_change_it_and_a_byte_does() {
        let mut content = vec![0; 5 * PIECE + 512];
        content[3] = 1;
        content[3 * PIECE..].fill(7);
        let whole = digest(&content, &[0, 1, 2]);
        assert_eq!(digest(&content, &[2, 0, 1]), whole);
        let mut longer = content.clone();
        longer.resize(9 * PIECE + 512, 0);
        assert_eq!(digest(&longer, &[4, 3, 2, 1, 0]), whole);
        let mut moved = vec![0; PIECE];
        moved.extend(&content);
        assert_ne!(digest(&moved, &[0, 1, 2, 3]), whole);
        content[PIECE * 5 + 511] ^= 1;
        assert_ne!(digest(&content, &[0, 1, 2]), whole);
    }
}
