//! A parser of pickles as PyTorch writes them: data only. Nothing is imported, called or executed.
//!
//! Opcodes and classes are on an allow-list; anything else is refused with its name. Objects live in an arena and refer to
//! each other by index, so that shared and even cyclic objects cost no more than the bytes that made them.
//!
//! Known classes: `collections.OrderedDict` (made without arguments), `torch._utils._rebuild_tensor_v2` and the storages of
//! integers and floats; `collections.Counter` of a dict, which is that dict; NumPy's scalars of integers, which are their
//! numbers. Protocol 2 and up to 5, as far as these opcodes go.

use std::collections::HashMap;

use crate::Problem;
use crate::npy::{Element, integer};

/// Largest pickle, in bytes.
pub(crate) const MAX_PICKLE_BYTES: u64 = 16 << 20;
/// Most objects of a pickle.
const MAX_OBJECTS: usize = 1 << 21;
/// Most digits of a storage's key: PyTorch numbers storages. A key is copied for each reference to it, a longer text never is.
const MAX_KEY_DIGITS: usize = 20;

/// Index of an object in its pickle.
pub(crate) type Id = usize;

/// An object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Object {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function of the allow-list.
    Known(Known),
    /// Where a tensor's numbers are.
    Storage(Storage),
    Tensor(Tensor),
    /// NumPy's type of integers.
    IntegerType(Element),
}

/// What a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    OrderedDict,
    RebuildTensor,
    Storage(StorageType),
    Counter,
    NumpyType,
    NumpyScalar,
}

/// Elements of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StorageType {
    Integer { bytes: usize, is_signed: bool },
    Float,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Storage {
    pub(crate) kind: StorageType,
    /// Name of the archive's entry.
    pub(crate) key: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tensor {
    pub(crate) storage: Storage,
    /// In elements.
    pub(crate) offset: u64,
    pub(crate) shape: Vec<u64>,
    /// In elements.
    pub(crate) stride: Vec<u64>,
}

/// A parsed pickle.
#[derive(Debug, Default)]
pub(crate) struct Pickle {
    objects: Vec<Object>,
    root: Id,
}

impl Pickle {
    /// Parses all of `bytes`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Problem> {
        let mut machine = Machine { bytes, at: 0, pickle: Self::default(), stack: Vec::new(), memo: HashMap::new() };
        while !machine.step()? {}
        Ok(machine.pickle)
    }

    pub(crate) fn root(&self) -> &Object {
        &self.objects[self.root]
    }

    pub(crate) fn get(&self, id: Id) -> &Object {
        &self.objects[id]
    }

    /// The value of a text key.
    pub(crate) fn value(&self, dict: &Object, key: &str) -> Option<&Object> {
        let Object::Dict(entries) = dict else { return None };
        let is_key = |id: Id| matches!(self.get(id), Object::Text(text) if text == key);
        entries.iter().find(|(k, _)| is_key(*k)).map(|(_, value)| self.get(*value))
    }
}

/// What is on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Object(Id),
    Mark,
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    pickle: Pickle,
    stack: Vec<Entry>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    /// Takes one opcode; true at the end.
    fn step(&mut self) -> Result<bool, Problem> {
        let opcode = self.take(1)?[0];
        match opcode {
            0x80 => match self.take(1)?[0] {
                2..=5 => {}
                other => return Err(self.bad(&format!("protocol {other}: allowed are 2 to 5"))),
            },
            0x95 => {
                self.take(8)?; // FRAME: its length is of no use here
            }
            b'}' => self.push(Object::Dict(Vec::new()))?,
            b']' => self.push(Object::List(Vec::new()))?,
            b')' => self.push(Object::Tuple(Vec::new()))?,
            b'N' => self.push(Object::None)?,
            0x88 => self.push(Object::Bool(true))?,
            0x89 => self.push(Object::Bool(false))?,
            b'(' => self.stack.push(Entry::Mark),
            b'K' | b'M' | b'J' | 0x8a => self.integer(opcode)?,
            b'G' => {
                let bytes = self.array::<8>()?;
                self.push(Object::Float(f64::from_be_bytes(bytes)))?;
            }
            b'X' | 0x8c => self.text(opcode)?,
            b'B' | b'C' => {
                let length = if opcode == b'C' { self.take(1)?[0].into() } else { u32::from_le_bytes(self.array()?) };
                let bytes = self.take(length as usize)?.to_vec();
                self.push(Object::Bytes(bytes))?;
            }
            b'q' | b'r' | 0x94 => self.memoize(opcode)?,
            b'h' | b'j' => self.recall(opcode)?,
            0x85..=0x87 => {
                let items = (0..opcode - 0x84).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                self.push(Object::Tuple(items.into_iter().rev().collect()))?;
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Object::Tuple(items))?;
            }
            b'a' | b'e' => {
                let items = if opcode == b'a' { vec![self.pop()?] } else { self.pop_to_mark()? };
                self.extend_list(items)?;
            }
            b's' | b'u' => self.set_items(opcode)?,
            b'c' | 0x93 => self.global(opcode)?,
            b'Q' => self.storage()?,
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            b'.' => {
                self.pickle.root = self.pop()?;
                return Ok(true);
            }
            other => {
                let shown =
                    if other.is_ascii_graphic() { char::from(other).to_string() } else { format!("{other:#04x}") };
                return Err(Problem::PickleCall(format!("opcode {shown}")));
            }
        }
        Ok(false)
    }

    fn bad(&self, what: &str) -> Problem {
        Problem::Syntax(format!("pickle: byte {}: {what}", self.at))
    }

    fn take(&mut self, count: usize) -> Result<&[u8], Problem> {
        let start = self.at;
        let Some(bytes) = start.checked_add(count).and_then(|end| self.bytes.get(start..end)) else {
            return Err(self.bad("it ends in the middle"));
        };
        self.at += count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn push(&mut self, object: Object) -> Result<(), Problem> {
        let id = self.pickle.objects.len();
        if id == MAX_OBJECTS {
            return Err(Problem::Limit { what: "objects in a pickle:", got: id as u64 + 1, max: MAX_OBJECTS as u64 });
        }
        self.pickle.objects.push(object);
        self.stack.push(Entry::Object(id));
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, Problem> {
        match self.stack.pop() {
            Some(Entry::Object(id)) => Ok(id),
            Some(Entry::Mark) | None => Err(self.bad("nothing on the stack")),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, Problem> {
        let Some(mark) = self.stack.iter().rposition(|entry| *entry == Entry::Mark) else {
            return Err(self.bad("no mark on the stack"));
        };
        let items = self.stack.drain(mark..).skip(1);
        Ok(items.filter_map(|entry| if let Entry::Object(id) = entry { Some(id) } else { None }).collect())
    }

    /// The object on top, which stays there.
    fn top(&mut self) -> Result<&mut Object, Problem> {
        match self.stack.last() {
            Some(Entry::Object(id)) => Ok(&mut self.pickle.objects[*id]),
            _ => Err(self.bad("nothing on the stack")),
        }
    }

    fn integer(&mut self, opcode: u8) -> Result<(), Problem> {
        let value = match opcode {
            b'K' => i64::from(self.take(1)?[0]),
            b'M' => i64::from(u16::from_le_bytes(self.array()?)),
            b'J' => i64::from(i32::from_le_bytes(self.array()?)),
            _ => {
                let length = usize::from(self.take(1)?[0]);
                if length > 8 {
                    return Err(self.bad("an integer of over 64 bits"));
                }
                let bytes = self.take(length)?;
                let is_negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                let mut wide = [if is_negative { 0xff } else { 0 }; 8];
                wide[..length].copy_from_slice(bytes);
                i64::from_le_bytes(wide)
            }
        };
        self.push(Object::Int(value))
    }

    fn text(&mut self, opcode: u8) -> Result<(), Problem> {
        let length = match opcode {
            b'X' => u32::from_le_bytes(self.array()?) as usize,
            _ => usize::from(self.take(1)?[0]),
        };
        let text = std::str::from_utf8(self.take(length)?).map(str::to_owned);
        let text = text.map_err(|_| self.bad("text that is no UTF-8"))?;
        self.push(Object::Text(text))
    }

    fn memoize(&mut self, opcode: u8) -> Result<(), Problem> {
        let key = match opcode {
            b'q' => u32::from(self.take(1)?[0]),
            b'r' => u32::from_le_bytes(self.array()?),
            _ => self.memo.len() as u32, // at most as many as bytes
        };
        let id = self.pop()?;
        self.stack.push(Entry::Object(id));
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, opcode: u8) -> Result<(), Problem> {
        let key = if opcode == b'h' { u32::from(self.take(1)?[0]) } else { u32::from_le_bytes(self.array()?) };
        let Some(&id) = self.memo.get(&key) else { return Err(self.bad("it recalls what it never kept")) };
        self.stack.push(Entry::Object(id));
        Ok(())
    }

    fn extend_list(&mut self, items: Vec<Id>) -> Result<(), Problem> {
        match self.top()? {
            Object::List(list) => list.extend(items),
            _ => return Err(self.bad("it appends to something that is no list")),
        }
        Ok(())
    }

    fn set_items(&mut self, opcode: u8) -> Result<(), Problem> {
        let items = match opcode {
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_to_mark()?,
        };
        let (pairs, []) = items.as_chunks::<2>() else { return Err(self.bad("a key without a value")) };
        match self.top()? {
            Object::Dict(entries) => entries.extend(pairs.iter().map(|&[key, value]| (key, value))),
            _ => return Err(self.bad("it sets an item of something that is no dict")),
        }
        Ok(())
    }

    /// A class or function by name.
    fn global(&mut self, opcode: u8) -> Result<(), Problem> {
        let (module, name) = if opcode == b'c' {
            let (module, name) = (self.line()?, self.line()?);
            (module, name)
        } else {
            let (name, module) = (self.pop()?, self.pop()?);
            let text = |id: Id| match self.pickle.get(id) {
                Object::Text(text) => text.clone(),
                _ => "?".to_owned(),
            };
            (text(module), text(name))
        };
        let integer = |bytes, is_signed| Known::Storage(StorageType::Integer { bytes, is_signed });
        let known = match (module.as_str(), name.as_str()) {
            ("collections", "OrderedDict") => Known::OrderedDict,
            ("collections", "Counter") => Known::Counter,
            ("numpy", "dtype") => Known::NumpyType,
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => Known::NumpyScalar,
            ("torch._utils", "_rebuild_tensor_v2") => Known::RebuildTensor,
            ("torch", "LongStorage") => integer(8, true),
            ("torch", "IntStorage") => integer(4, true),
            ("torch", "ShortStorage") => integer(2, true),
            ("torch", "CharStorage") => integer(1, true),
            ("torch", "ByteStorage" | "BoolStorage") => integer(1, false),
            ("torch", "DoubleStorage" | "FloatStorage" | "HalfStorage" | "BFloat16Storage") => {
                Known::Storage(StorageType::Float)
            }
            _ => {
                let shown: String = format!("{module}.{name}").chars().take(120).collect();
                return Err(Problem::PickleCall(shown));
            }
        };
        self.push(Object::Known(known))
    }

    fn line(&mut self) -> Result<String, Problem> {
        let rest = &self.bytes[self.at..];
        let Some(length) = rest.iter().take(1 << 10).position(|&b| b == b'\n') else {
            return Err(self.bad("a name without an end"));
        };
        let line = String::from_utf8_lossy(&rest[..length]).into_owned();
        self.at += length + 1;
        Ok(line)
    }

    /// `('storage', type, key, location, count)`, the one kind of reference that PyTorch writes.
    fn storage(&mut self) -> Result<(), Problem> {
        let id = self.pop()?;
        let Object::Tuple(items) = self.pickle.get(id) else { return Err(self.bad("a reference that is no tuple")) };
        let parts: Vec<&Object> = items.iter().take(5).map(|&item| self.pickle.get(item)).collect();
        let storage = match parts.as_slice() {
            [Object::Text(word), Object::Known(Known::Storage(kind)), Object::Text(key), _, Object::Int(_)]
                if word == "storage"
                    && (1..=MAX_KEY_DIGITS).contains(&key.len())
                    && key.bytes().all(|b| b.is_ascii_digit()) =>
            {
                Storage { kind: *kind, key: key.clone() }
            }
            _ => return Err(self.bad("a reference that is no storage")),
        };
        self.push(Object::Storage(storage))
    }

    /// "Calls" something of the allow-list: makes the object that the call stands for.
    fn reduce(&mut self) -> Result<(), Problem> {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let (callee, arguments) = (self.pickle.get(callee), self.pickle.get(arguments));
        let made = match (callee, arguments) {
            (Object::Known(Known::Counter), Object::Tuple(items)) if items.is_empty() => Object::Dict(Vec::new()),
            (Object::Known(Known::Counter), Object::Tuple(items)) => match items.as_slice() {
                // The dict itself: nothing is copied.
                &[dict] if matches!(self.pickle.get(dict), Object::Dict(_)) => {
                    self.stack.push(Entry::Object(dict));
                    return Ok(());
                }
                _ => return Err(self.bad("a counter with strange arguments")),
            },
            (Object::Known(Known::NumpyType), Object::Tuple(items)) => match self.integer_type(items) {
                Some(element) => Object::IntegerType(element),
                None => return Err(self.bad("a NumPy type that is no integer")),
            },
            (Object::Known(Known::NumpyScalar), Object::Tuple(items)) => match self.scalar(items) {
                Some(value) => Object::Int(value),
                None => return Err(self.bad("a NumPy scalar that is no integer")),
            },
            (Object::Known(Known::OrderedDict), Object::Tuple(items)) if items.is_empty() => Object::Dict(Vec::new()),
            (Object::Known(Known::RebuildTensor), Object::Tuple(items)) => match self.tensor(items) {
                Some(tensor) => Object::Tensor(tensor),
                None => return Err(self.bad("a tensor with strange arguments")),
            },
            (Object::Known(known), _) => return Err(Problem::PickleCall(format!("{known:?} with arguments"))),
            _ => return Err(Problem::PickleCall("something that is no known function".to_owned())),
        };
        self.push(made)
    }

    /// Of `dtype('i8', False, True)`; its byte order comes by [`Machine::build`].
    fn integer_type(&self, items: &[Id]) -> Option<Element> {
        let Object::Text(name) = self.pickle.get(*items.first()?) else { return None };
        let name = name.trim_start_matches(['<', '|', '=']);
        let is_signed = name.starts_with('i');
        let bytes = name.strip_prefix(['i', 'u'])?.parse().ok().filter(|bytes| [1, 2, 4, 8].contains(bytes))?;
        Some(Element::Integer { bytes, is_signed, is_big_endian: false })
    }

    /// Of `scalar(dtype, bytes)`.
    fn scalar(&self, items: &[Id]) -> Option<i64> {
        let &[kind, bytes] = items else { return None };
        match (self.pickle.get(kind), self.pickle.get(bytes)) {
            (&Object::IntegerType(element), Object::Bytes(bytes)) if bytes.len() == element.bytes() => {
                i64::try_from(integer(bytes, element)).ok()
            }
            _ => None,
        }
    }

    /// Sets the state of a NumPy type, `(version, byte order, ..)`: the one object here that has any.
    fn build(&mut self) -> Result<(), Problem> {
        let state = self.pop()?;
        let order = match self.pickle.get(state) {
            Object::Tuple(items) => items.get(1).map(|&order| self.pickle.get(order)),
            _ => None,
        };
        let is_big = match order {
            Some(Object::Text(order)) if ["<", "|", "=", ">"].contains(&order.as_str()) => order == ">",
            _ => return Err(Problem::PickleCall("the state of something that is no NumPy type".to_owned())),
        };
        match self.top()? {
            Object::IntegerType(Element::Integer { is_big_endian, .. }) => *is_big_endian = is_big,
            _ => return Err(Problem::PickleCall("the state of something that is no NumPy type".to_owned())),
        }
        Ok(())
    }

    /// `(storage, offset, shape, stride, ..)`.
    fn tensor(&self, items: &[Id]) -> Option<Tensor> {
        let [storage, offset, shape, stride, ..] = items else { return None };
        let Object::Storage(storage) = self.pickle.get(*storage) else { return None };
        let number = |id: Id| match self.pickle.get(id) {
            Object::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        };
        let numbers = |id: Id| match self.pickle.get(id) {
            Object::Tuple(items) if items.len() <= 8 => items.iter().map(|&item| number(item)).collect(),
            _ => None,
        };
        let (shape, stride): (Vec<u64>, Vec<u64>) = (numbers(*shape)?, numbers(*stride)?);
        let offset = number(*offset)?;
        (shape.len() == stride.len()).then(|| Tensor { storage: storage.clone(), offset, shape, stride })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key of 100,000 digits that 20,000 references name took 2 GB: a copy for each.
    #[test]
    fn references_to_a_storage_do_not_multiply_its_key() {
        let reference = |digits: usize, times: usize| {
            let mut bytes = b"\x80\x02]q\x00((X\x07\x00\x00\x00storagectorch\nLongStorage\nX".to_vec();
            bytes.extend((digits as u32).to_le_bytes());
            bytes.extend(std::iter::repeat_n(b'1', digits));
            // The tuple is kept, and referred to again and again.
            bytes.extend(b"X\x03\x00\x00\x00cpuK\x01tq\x01Q");
            (1..times).for_each(|_| bytes.extend(b"h\x01Q"));
            bytes.extend(b"e.");
            Pickle::parse(&bytes).map(drop)
        };
        assert!(reference(20, 20_000).is_ok());
        let refused = reference(100_000, 20_000).expect_err("a key that is no number of a storage").to_string();
        assert!(refused.contains("a reference that is no storage"), "{refused}");
    }

    #[test]
    fn data_is_read_and_shared_objects_stay_shared() {
        // {'a': [1, -2, 1.5], 'b': the same list, 'c': (True, None, 70000)}
        let mut bytes = b"\x80\x02}q\x00(X\x01\x00\x00\x00a]q\x01(K\x01J\xfe\xff\xff\xffG".to_vec();
        bytes.extend(1.5_f64.to_be_bytes());
        bytes.extend(b"eX\x01\x00\x00\x00bh\x01X\x01\x00\x00\x00c\x88N\x8a\x03\x70\x11\x01\x87u.");
        let pickle = Pickle::parse(&bytes).expect("a pickle");
        let Some(Object::List(items)) = pickle.value(pickle.root(), "a") else { panic!("no list") };
        assert_eq!((pickle.get(items[0]), pickle.get(items[1])), (&Object::Int(1), &Object::Int(-2)));
        assert_eq!(pickle.value(pickle.root(), "a"), pickle.value(pickle.root(), "b"));
        let Some(Object::Tuple(items)) = pickle.value(pickle.root(), "c") else { panic!("no tuple") };
        assert_eq!(pickle.get(items[2]), &Object::Int(70_000));
    }

    #[test]
    fn nothing_off_the_list_is_called() {
        for (bytes, named) in [
            (&b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R."[..], "posix.system"),
            (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93X\x01\x00\x00\x001\x85R.", "builtins.eval"),
            (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "OrderedDict with arguments"),
            (b"\x80\x02}}b.", "the state of something"),
            (b"\x80\x02}}o.", "opcode o"),
            (b"\x80\x02i__main__\nX\n.", "opcode i"),
            (b"\x80\x02K\x01)R.", "no known function"),
        ] {
            match Pickle::parse(bytes) {
                Err(Problem::PickleCall(got)) => assert!(got.contains(named), "{got}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn torn_and_absurd_pickles_are_errors() {
        let good = b"\x80\x02}q\x00(X\x01\x00\x00\x00a]q\x01(K\x01K\x02eX\x01\x00\x00\x00bh\x01u.";
        assert!(Pickle::parse(good).is_ok());
        for length in 0..good.len() {
            assert!(Pickle::parse(&good[..length]).is_err(), "{length}");
        }
        for bad in [&b"."[..], b"h\x07.", b"e.", b"X\xff\xff\xff\xff", b"K\x01s.", b"((t", b"}(K\x01u.", b"K\x01Q."] {
            assert!(Pickle::parse(bad).is_err(), "{bad:?}");
        }
    }
}
