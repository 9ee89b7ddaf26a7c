//! The API: HTTP/1.1 and JSON on a UNIX socket.
//!
//! - [`types`]: what goes over it.
//! - [`socket`]: the socket file, which belongs to one living process at a time.
//! - [`server`]: the routes, and the thread that serves them.
//! - [`OPENAPI`]: the description, `docs/openapi.json`; a test holds it, the routes and the types together.
//!
//! Contract: one thread runs all connections and never blocks; whatever may take time runs on worker threads. Every
//! answer is JSON; every answer that is not 2xx is an [`types::ErrorBody`].

pub mod server;
pub mod socket;
pub mod types;

/// The OpenAPI 3.1 description of the API.
pub const OPENAPI: &str = include_str!("../../../../docs/openapi.json");

/// Where the API begins in the path of a request.
pub const BASE: &str = "/api/v1";

#[cfg(test)]
mod tests;
