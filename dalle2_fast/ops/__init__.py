"""The ops, one module each: public function, checks, reference. `dalle2_fast.functional` names them all."""
