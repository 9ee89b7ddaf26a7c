//! Optional features by name, offered by the source and accepted by the destination in the handshake.

/// What this program can do beyond the protocol's version: nothing yet.
const KNOWN: &[&str] = &[];

/// What the source offers.
pub(crate) fn offered() -> Vec<String> {
    KNOWN.iter().map(|f| (*f).to_string()).collect()
}

/// What the destination takes of an offer.
pub(crate) fn accepted(offer: &[String]) -> Vec<String> {
    offer.iter().filter(|f| KNOWN.contains(&f.as_str())).cloned().collect()
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
        assert!(accepted(&["teleport".into()]).is_empty());
        assert!(agreed(&["teleport".into()]).is_err());
        assert_eq!(agreed(&accepted(&offered())), Ok(offered()));
    }
}
