//! What an invariant cannot say: that something can still be reached.
//!
//! From every state in which a complete copy of the VM is left and nobody runs it, there must be a way, without any further
//! fault, to a state in which it runs. The way may need the operator. All states are visited, and the ways are
//! followed backwards from the states in which the VM runs.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use stateright::Model as _;

use crate::world::{Action, Copy, Model, World};

/// What was found.
#[derive(Debug)]
pub struct Reachable {
    /// All states.
    pub states: usize,
    /// Those from which the VM must be able to run.
    pub must: usize,
    /// Those of them from which it cannot, the first few, with the way there.
    pub stuck: Vec<(Vec<Action>, World)>,
}

struct Node {
    /// The state before it and the action that led here, for the report.
    from: Option<(u32, Action)>,
    must: bool,
    runs: bool,
}

fn fingerprint(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

/// Visits everything.
pub fn explore(model: &Model) -> Reachable {
    let mut seen: HashMap<u64, u32> = HashMap::new();
    let mut nodes = Vec::new();
    let mut backwards: Vec<Vec<u32>> = Vec::new();
    let mut frontier: Vec<(u32, World)> = Vec::new();
    let mut add = |world: World, from: Option<(u32, Action)>, nodes: &mut Vec<Node>, next: &mut Vec<(u32, World)>| {
        *seen.entry(fingerprint(&world)).or_insert_with(|| {
            let id = nodes.len() as u32;
            let runs = world.source.copy == Copy::Runs || world.destinations.iter().any(|d| d.copy == Copy::Runs);
            nodes.push(Node { from, must: !runs && !world.booted && world.complete_copy(model.carriage), runs });
            next.push((id, world));
            id
        })
    };
    for world in model.init_states() {
        add(world, None, &mut nodes, &mut frontier);
    }
    let mut actions = Vec::new();
    while !frontier.is_empty() {
        let mut next = Vec::new();
        for (id, world) in &frontier {
            actions.clear();
            model.actions(world, &mut actions);
            for action in actions.drain(..) {
                let fault = action.is_fault();
                let Some(reached) = model.next_state(world, action.clone()) else { continue };
                let reached = add(reached, Some((*id, action)), &mut nodes, &mut next);
                backwards.resize_with(nodes.len(), Vec::new);
                if !fault {
                    backwards[reached as usize].push(*id);
                }
            }
        }
        frontier = next;
    }

    let mut can: Vec<bool> = nodes.iter().map(|n| n.runs).collect();
    let mut queue: Vec<u32> = (0..nodes.len() as u32).filter(|id| can[*id as usize]).collect();
    while let Some(id) = queue.pop() {
        for &before in &backwards[id as usize] {
            if !std::mem::replace(&mut can[before as usize], true) {
                queue.push(before);
            }
        }
    }
    let stuck = nodes.iter().zip(&can).enumerate().filter(|(_, (node, can))| node.must && !**can);
    let stuck = stuck.take(3).map(|(id, _)| way(model, &nodes, id)).collect();
    Reachable { states: nodes.len(), must: nodes.iter().filter(|n| n.must).count(), stuck }
}

fn way(model: &Model, nodes: &[Node], id: usize) -> (Vec<Action>, World) {
    let mut actions = Vec::new();
    let mut at = id;
    while let Some((from, action)) = &nodes[at].from {
        actions.push(action.clone());
        at = *from as usize;
    }
    actions.reverse();
    let mut world = model.init_states().remove(0);
    for action in &actions {
        world = model.next_state(&world, action.clone()).unwrap();
    }
    (actions, world)
}
