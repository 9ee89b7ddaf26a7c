//! Optional features by name, offered by the source and accepted by the destination in the handshake.

/// Pages may follow the switch.
pub(crate) const POSTCOPY: &str = "postcopy";

/// What this program can do beyond the protocol's version.
const KNOWN: &[&str] = &[POSTCOPY];

/// What the source offers.
pub(crate) fn offered(postcopy: bool) -> Vec<String> {
    KNOWN.iter().filter(|f| postcopy || **f != POSTCOPY).map(|f| (*f).to_string()).collect()
}

/// What the destination takes of an offer.
pub(crate) fn accepted(offer: &[String], postcopy: bool) -> Vec<String> {
    let known = |f: &&String| KNOWN.contains(&f.as_str()) && (postcopy || *f != POSTCOPY);
    offer.iter().filter(known).cloned().collect()
}

/// What the source makes of the answer: a feature that was not offered is an error.
pub(crate) fn agreed(answer: &[String]) -> Result<Vec<String>, String> {
    match answer.iter().find(|f| !KNOWN.contains(&f.as_str())) {
        None => Ok(answer.to_vec()),
        Some(feature) => Err(format!("it accepted the feature {feature:?}, which was not offered")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_features_of_an_offer_are_left_out_and_in_an_answer_an_error() {
        assert!(accepted(&["teleport".into()], true).is_empty());
        assert!(agreed(&["teleport".into()]).is_err());
        assert_eq!(agreed(&accepted(&offered(true), true)), Ok(vec![POSTCOPY.to_string()]));
        assert!(accepted(&offered(true), false).is_empty() && offered(false).is_empty());
    }
}
