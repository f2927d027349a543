//! Fields of a request that we do not know: of a newer client, or nonsense.
//!
//! A decoder leaves them out, and what they ask for would be left out in silence.

use prost::decode_length_delimiter as number;

/// A field that we do not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// Its number, and in what it is: `field 72 of opts`.
    pub name: String,
    /// Whether it says more than 0 or `false`.
    pub set: bool,
}

/// The fields of a message: their numbers up to the last, and which of them are messages.
struct Fields {
    name: &'static str,
    last: u32,
    /// Numbers that are not used.
    but: &'static [u32],
    within: &'static [(u32, Fields)],
}

const fn fields(name: &'static str, last: u32) -> Fields {
    Fields {
        name,
        last,
        but: &[],
        within: &[],
    }
}

/// Those of a request, as [`super::proto`] has them.
const REQUEST: Fields = Fields {
    within: &[(2, OPTS), (5, fields("features", 3))],
    ..fields("the request", 6)
};

const OPTS: Fields = Fields {
    but: &[40],
    within: &[
        (11, fields("ps", 4)),
        (19, fields("veths", 2)),
        (23, fields("ext_mnt", 2)),
        (25, fields("cg_root", 2)),
        (27, fields("inherit_fd", 2)),
        (33, fields("unix_sk_ino", 1)),
        (39, fields("join_ns", 3)),
    ],
    ..fields("opts", 71)
};

/// What is not known of the request that these bytes are.
pub fn of_request(bytes: &[u8]) -> Vec<Unknown> {
    let mut found = Vec::new();
    // It was decoded already, so there is nothing that cannot be read, but of groups, which nobody uses.
    if walk(bytes, &REQUEST, &mut found).is_none() {
        found.push(Unknown {
            name: "a field of an odd type".to_owned(),
            set: true,
        });
    }
    found
}

/// <https://protobuf.dev/programming-guides/encoding/>; none if this is not so encoded.
fn walk(mut bytes: &[u8], fields: &Fields, found: &mut Vec<Unknown>) -> Option<()> {
    while !bytes.is_empty() {
        let key = number(&mut bytes).ok()?;
        let (field, kind) = ((key >> 3) as u32, key & 7);
        let (value, set): (&[u8], bool) = match kind {
            0 => (&[], number(&mut bytes).ok()? != 0),
            1 => (bytes.split_off(..8)?, true),
            2 => {
                let length = number(&mut bytes).ok()?;
                (bytes.split_off(..length)?, true)
            }
            5 => (bytes.split_off(..4)?, true),
            _ => return None,
        };
        if let Some((_, inner)) = fields.within.iter().find(|(n, _)| *n == field) {
            walk(value, inner, found)?;
        } else if field > fields.last || fields.but.contains(&field) {
            found.push(Unknown {
                name: format!("field {field} of {}", fields.name),
                set,
            });
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unknown(bytes: &[u8]) -> Vec<(String, bool)> {
        let all = of_request(bytes).into_iter();
        all.map(|u| (u.name, u.set)).collect()
    }

    #[test]
    fn fields_are_named_with_what_they_are_in() {
        // A dump; opts with field 72 = 0 and 40 = 1, and a page server with field 5 = "x"; field 7 = 0.
        let ps = [0x5a, 3, 0x2a, 1, b'x'];
        let opts = [&[0xc0, 4, 0, 0xc0, 2, 1][..], &ps].concat();
        let mut req = vec![8, 1, 0x12, opts.len() as u8];
        req.extend(opts);
        req.extend([0x38, 0]);
        let name = |field: &str| field.to_owned();
        assert_eq!(
            unknown(&req),
            [
                (name("field 72 of opts"), false),
                (name("field 40 of opts"), true),
                (name("field 5 of ps"), true),
                (name("field 7 of the request"), false),
            ]
        );
        assert_eq!(unknown(&[8, 1]), []);
    }
}
