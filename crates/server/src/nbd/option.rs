//! What is in the data of an option: taken apart here, answered in [`handshake`](super::handshake).

use super::proto::{ALLOCATION, Fields};

/// A client wants to know about an export, or to use it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Choice<'a> {
    pub(super) name: &'a str,
    /// What it wants to know.
    pub(super) infos: Vec<u16>,
}

impl<'a> Choice<'a> {
    /// `None` if the data is malformed.
    pub(super) fn parse(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u16()?;
        let infos = (0..count)
            .map(|_| fields.u16())
            .collect::<Option<Vec<_>>>()?;
        fields.0.is_empty().then_some(Self { name, infos })
    }
}

/// A client asks for metadata contexts of an export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Contexts<'a> {
    pub(super) name: &'a str,
    queries: Vec<&'a str>,
}

impl<'a> Contexts<'a> {
    /// `None` if the data is malformed.
    pub(super) fn parse(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u32()?;
        // Not collected by the count, which may be any number: each query takes four bytes of the data at least.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(fields.string()?);
        }
        fields.0.is_empty().then_some(Self { name, queries })
    }

    /// Whether what we have is to be listed: asked for, by a wildcard perhaps, or nothing was named.
    pub(super) fn list_allocation(&self) -> bool {
        let asked = |query: &&str| *query == ALLOCATION || *query == "base:";
        self.queries.is_empty() || self.queries.iter().any(asked)
    }

    /// Whether what we have is chosen.
    pub(super) fn choose_allocation(&self) -> bool {
        self.queries.contains(&ALLOCATION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(text: &str) -> Vec<u8> {
        let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes
    }

    /// A choice is a name and what is to be told; more or fewer bytes are a mistake.
    #[test]
    fn choices_are_parsed() {
        let mut data = string("pmem0");
        data.extend([0, 2, 0, 3, 0, 1]);
        let choice = Choice::parse(&data).unwrap();
        assert_eq!((choice.name, choice.infos), ("pmem0", vec![3, 1]));
        assert_eq!(Choice::parse(&data[..data.len() - 1]), None);
        data.push(0);
        assert_eq!(Choice::parse(&data), None);
        assert_eq!(Choice::parse(&[]), None);
    }

    fn contexts(queries: &[&str]) -> Vec<u8> {
        let mut data = string("x");
        data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
        data.extend(queries.iter().flat_map(|query| string(query)));
        data
    }

    /// Listing knows wildcards and lists all if nothing is named; choosing takes full names only.
    #[test]
    fn contexts_are_listed_and_chosen() {
        let ask = |queries: &[&str]| {
            let data = contexts(queries);
            let contexts = Contexts::parse(&data).unwrap();
            (contexts.list_allocation(), contexts.choose_allocation())
        };
        assert_eq!(ask(&[]), (true, false));
        assert_eq!(ask(&["base:"]), (true, false));
        assert_eq!(
            ask(&["qemu:dirty-bitmap:x", "base:allocation"]),
            (true, true)
        );
        assert_eq!(ask(&["x-other:thing"]), (false, false));
    }

    /// A count of queries that are not there is a mistake, and takes no memory.
    #[test]
    fn counts_are_not_believed() {
        let mut data = contexts(&["base:allocation"]);
        data[5..9].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(Contexts::parse(&data), None);
    }
}
