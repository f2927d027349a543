//! Where the fields of the kernel's own structures are: its BTF.
//!
//! # References
//! The kernel's Documentation/bpf/btf.rst

use std::ops::Range;

use freezeframe_error::{Error, Kind, Result};

const KERNEL: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
/// A type's name, what it is, and its size or the type it refers to: u32 each.
const HEAD: usize = 12;
/// A member's name, type and place in bits: u32 each.
const MEMBER: usize = 12;
/// How deep types may refer to each other.
const DEEP: usize = 16;

/// What a type is, of those that are looked for or looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Is {
    /// `struct NAME`.
    Struct = 4,
    /// A function.
    Function = 12,
}

/// Where a field is, within the structure that was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its offset in bytes.
    pub offset: u32,
    /// Its size in bytes.
    pub size: u32,
}

/// The types of this kernel.
#[derive(Debug)]
pub struct Btf {
    data: Vec<u8>,
    /// Where each type is in the data, by its number less one.
    types: Vec<u32>,
    strings: Range<usize>,
}

impl Btf {
    /// Those of the kernel that runs. [`Kind::Unsupported`] if it tells none.
    pub fn of_kernel() -> Result<Btf> {
        let data = std::fs::read(KERNEL)
            .map_err(|e| Error::unsupported("the kernel does not tell its types").caused_by(e))?;
        Btf::parse(data)
            .ok_or_else(|| Error::new(Kind::Unsupported, format!("{KERNEL}: not understood")))
    }

    /// None if it is cut off or of a kind we do not know.
    fn parse(data: Vec<u8>) -> Option<Btf> {
        if u16::from_le_bytes(data.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let [header, at, len, strings, strings_len] =
            [4, 8, 12, 16, 20].map(|at| u32_at(&data, at));
        let header = header? as usize;
        let mut at = header + at? as usize;
        let end = at + len? as usize;
        let strings =
            header + strings? as usize..header + strings? as usize + strings_len? as usize;
        let mut types = Vec::new();
        while at < end {
            types.push(at as u32);
            let info = u32_at(&data, at + 4)?;
            at += HEAD + more(kind(info), (info & 0xffff) as usize)?;
        }
        data.get(strings.clone())?;
        Some(Btf {
            data,
            types,
            strings,
        })
    }

    fn word(&self, at: usize) -> Option<u32> {
        u32_at(&self.data, at)
    }

    fn is_named(&self, name_at: u32, name: &str) -> bool {
        let rest = self.data[self.strings.clone()]
            .get(name_at as usize..)
            .unwrap_or_default();
        rest.strip_prefix(name.as_bytes())
            .is_some_and(|end| end.first() == Some(&0))
    }

    /// The number of the type of this name.
    pub fn find(&self, is: Is, name: &str) -> Result<u32> {
        let found = self.types.iter().position(|&at| {
            let at = at as usize;
            let of_kind = self
                .word(at + 4)
                .is_some_and(|info| kind(info) == is as u32);
            of_kind && self.word(at).is_some_and(|n| self.is_named(n, name))
        });
        let number =
            found.ok_or_else(|| Error::unsupported(format!("the kernel has no {name}")))?;
        Ok(number as u32 + 1)
    }

    /// The size of a type in bytes.
    pub fn size_of(&self, id: u32) -> Result<u32> {
        self.size(id, 0)
            .ok_or_else(|| Error::unsupported("a type of this kernel has no size"))
    }

    /// A field of a structure, `a.b` for one of a structure in it.
    pub fn field(&self, structure: u32, path: &str) -> Result<Field> {
        let mut id = structure;
        let mut field = Field { offset: 0, size: 0 };
        for name in path.split('.') {
            let (of, bits) = self.member(id, name, 0).ok_or_else(|| {
                Error::unsupported(format!("a structure of this kernel has no {path}"))
            })?;
            id = of;
            field.offset += bits / 8;
        }
        // An array without a length has no size.
        field.size = self.size(id, 0).unwrap_or(0);
        Ok(field)
    }

    /// A member's type, and its place in bits; also of what is in it without a name.
    fn member(&self, id: u32, name: &str, depth: usize) -> Option<(u32, u32)> {
        let at = self.at(self.bare(id)?)?;
        let info = self.word(at + 4)?;
        if !matches!(kind(info), STRUCT | UNION) || depth > DEEP {
            return None;
        }
        let members = (0..(info & 0xffff) as usize).map(|i| at + HEAD + i * MEMBER);
        for member in members {
            let (named, of, bits) = (
                self.word(member)?,
                self.word(member + 4)?,
                self.word(member + 8)?,
            );
            // The upper byte is the length of a bit field.
            let bits = if info >> 31 == 1 {
                bits & 0x00ff_ffff
            } else {
                bits
            };
            if self.is_named(named, name) {
                return Some((of, bits));
            }
            if self.is_named(named, "")
                && let Some((found, more)) = self.member(of, name, depth + 1)
            {
                return Some((found, bits + more));
            }
        }
        None
    }

    fn at(&self, id: u32) -> Option<usize> {
        Some(*self.types.get(id.checked_sub(1)? as usize)? as usize)
    }

    /// The type behind its other names and qualifiers.
    fn bare(&self, mut id: u32) -> Option<u32> {
        for _ in 0..DEEP {
            let at = self.at(id)?;
            match kind(self.word(at + 4)?) {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => id = self.word(at + 8)?,
                _ => return Some(id),
            }
        }
        None
    }

    fn size(&self, id: u32, depth: usize) -> Option<u32> {
        let at = self.at(self.bare(id)?)?;
        match kind(self.word(at + 4)?) {
            INT | STRUCT | UNION | ENUM | ENUM64 => self.word(at + 8),
            PTR => Some(8),
            ARRAY if depth < DEEP => {
                let [of, count] = [at + HEAD, at + HEAD + 8].map(|at| self.word(at));
                self.size(of?, depth + 1)?.checked_mul(count?)
            }
            _ => None,
        }
    }
}

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = Is::Struct as u32;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

fn kind(info: u32) -> u32 {
    info >> 24 & 0x1f
}

/// How many bytes follow the head of a type of this kind with so many parts.
fn more(kind: u32, parts: usize) -> Option<usize> {
    Some(match kind {
        INT | 14 | 17 => 4,
        PTR | 7..=12 | 16 | TYPE_TAG => 0,
        ARRAY => 12,
        STRUCT | UNION | 15 | ENUM64 => 12 * parts,
        ENUM | 13 => 8 * parts,
        _ => return None,
    })
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}
